"""Where the bytes of streamed blocks lie: on this device or in host memory, whole or in parts over a group of ranks.

    store = BlockStore(device, sizes={0: 453_000_000, …}, on_device=frozenset(), group=None)
    store.put(0, flat)              # keeps (this rank's part of) it
    store.fetch(0, slot)            # the whole of it into a buffer on the device, on the current stream

A group's ranks each keep 1/N of every buffer; a fetch is one all-gather of N equal parts. With the parts in host memory each
rank copies its own over its own PCIe link first, so that N ranks share the wire's work as well as the memory. This is what
ZeRO stage 3 does to parameters, at the granularity of a block and without gradients
(Rajbhandari et al. 2020, arXiv:1910.02054).
"""

import torch
import torch.distributed as dist

from qwen_image.loading.pinned_memory import Arena


class BlockStore:
    """Bytes of blocks by their number.

    Args:
        device: where fetches go.
        sizes: bytes of each block's buffer.
        on_device: the blocks whose bytes lie there too; all others are in host memory.
        group: the ranks that share the bytes; None: this rank has them whole. `fetch` is then a collective of the group.
        pinned: page-locked host memory, from which a GPU copies at its link's speed while it computes.
    """

    def __init__(
        self,
        device: torch.device,
        sizes: dict[int, int],
        on_device: frozenset[int] = frozenset(),
        group: dist.ProcessGroup | None = None,
        pinned: bool = True,
    ) -> None:
        self.device, self.sizes, self.on_device, self.group = device, sizes, on_device, group
        self.ranks = 1 if group is None else dist.get_world_size(group)
        self.rank = 0 if group is None else dist.get_rank(group)
        self.parts: dict[int, torch.Tensor] = {}
        there = [self.part_size(size) for block, size in sizes.items() if block in on_device]
        host = [self.part_size(size) for block, size in sizes.items() if block not in on_device]
        lock = pinned and device.type == "cuda"
        self.arenas = {
            True: Arena(device, torch.uint8, pinned=False, remaining=sum(there)),
            False: Arena(torch.device("cpu"), torch.uint8, pinned=lock, remaining=sum(host)),
        }
        # A part on its way from the host to the ranks.
        staged = group is not None and device.type == "cuda" and host
        self.staging = torch.empty(max(host) if staged else 0, dtype=torch.uint8, device=device)

    def part_size(self, size: int) -> int:
        """Bytes that one rank keeps of a buffer."""
        return -(-size // self.ranks)

    def slot_size(self) -> int:
        """Bytes that a buffer must have to receive any block: the parts of all ranks, padded to be equal."""
        return max((self.part_size(size) * self.ranks for size in self.sizes.values()), default=0)

    def put(self, block: int, flat: torch.Tensor) -> None:
        """Keep uint8 [size] (anywhere); every rank of the group must give the same."""
        size, part = self.part_size(self.sizes[block]), self._part(block)
        mine = flat[self.rank * size : min((self.rank + 1) * size, self.sizes[block])]
        part[: len(mine)].copy_(mine)
        part[len(mine) :].zero_()

    def room(self, block: int) -> torch.Tensor:
        """The block's own bytes, uint8 [size], to be filled in place instead of by `put`; without a group."""
        assert self.group is None
        return self._part(block)

    def _part(self, block: int) -> torch.Tensor:
        if block not in self.parts:
            self.parts[block] = self.arenas[block in self.on_device].take(self.part_size(self.sizes[block]))
        return self.parts[block]

    def fetch(self, block: int, into: torch.Tensor) -> None:
        """Fill uint8 [≥ slot_size] on the device with the block's buffer; asynchronous on a GPU's current stream."""
        part = self.parts[block]
        if self.group is None:
            into[: part.numel()].copy_(part, non_blocking=True)
            return
        if part.device != into.device:
            self.staging[: part.numel()].copy_(part, non_blocking=True)
            part = self.staging[: part.numel()]
        dist.all_gather_into_tensor(into[: part.numel() * self.ranks], part, group=self.group)
