"""Frozen blocks whose matrices are on the device only while their block computes, in the forward and in the backward pass.

    stream = BlockStream(layouts, store, slots=3, device=device)        # layouts: {block: its matrices}
    stream.bind_block(7, module)                                        # its parameters are now views of a slot
    image, text = stream.enter(7, image, text); …block 7…; image, text = stream.leave(7, image, text)

A few buffers on the device, the slots, hold the blocks that are needed next. The k-th streamed block always lies in slot
k mod slots, so its parameters are bound once, as views; only contents change, and before any kernel of the block reads
them they are right: in the forward pass because `enter` waits for them, in the backward pass because an identity function
of autograd around the block's outputs, whose backward runs before everything in the block, waits again. So whatever
autograd, PEFT, the compiler or a kernel has saved of a weight is right when it is used. Buffers are refilled on a side
stream while the blocks before compute (prefetching into spare buffers, as DeepSpeed's ZeRO-3 and PyTorch's FSDP do; here
the order is known in advance). Blocks that are not in `layouts` are left alone: they are resident.

Addressed by block and never by counting: a pass that ends early, forward passes alone, and passes over some of the blocks
need no reset. Every rank of a group must make the same passes.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from qwen_image.streaming.block_layout import BlockLayout, put_parameter
from qwen_image.streaming.block_store import BlockStore

SLOTS = 3  # one computes, one is there, one arrives
POISON = 0xFF  # as bf16, float8 and float32 all NaN

# Turns a block's stored bytes into those that its kernels read: (block, stored, slot).
Decode = Callable[[int, torch.Tensor, torch.Tensor], None]


class BlockStream:
    """The streamed blocks of one model.

    Args:
        layouts: of each streamed block, as its kernels read it.
        store: their bytes.
        slots: buffers on the device.
        decode: from stored to computed with, where these differ (8 bits that become bf16 on arrival).

    Attributes:
        paused: nothing is fetched, and slots hold whatever they hold: for trial steps, whose numbers don't matter.
        poisoned: slots are filled with NaN before they are refilled, so that a stale weight shows (for tests).
    """

    def __init__(
        self,
        layouts: dict[int, BlockLayout],
        store: BlockStore,
        device: torch.device,
        slots: int = SLOTS,
        decode: Decode | None = None,
    ) -> None:
        assert layouts and slots >= 1
        self.layouts, self.store, self.device, self.decode = layouts, store, device, decode
        self.blocks = sorted(layouts)
        slots = min(slots, len(self.blocks))
        self.slot_of = {block: place % slots for place, block in enumerate(self.blocks)}
        size = max(layout.size for layout in layouts.values())
        if decode is None:
            size = max(size, store.slot_size())
        self.slots = [torch.zeros(size, dtype=torch.uint8, device=device) for _ in range(slots)]
        self.holds: list[int | None] = [None] * slots
        stored = store.slot_size() if decode is not None else 0
        self.arrival = torch.empty(stored, dtype=torch.uint8, device=device)
        self.side = torch.cuda.Stream(device) if device.type == "cuda" else None
        self.arrived: list[torch.cuda.Event | None] = [None] * slots  # None: nothing to wait for
        self.paused = self.poisoned = False
        self.fetches = 0

    @property
    def slot_bytes(self) -> int:
        """Bytes on the device besides the store's."""
        return sum(slot.numel() for slot in self.slots) + self.arrival.numel() + self.store.staging.numel()

    def bind_block(self, block: int, module: nn.Module) -> None:
        """Let the matrices of a streamed block be views of its slot."""
        for name, view in self.layouts[block].views(self.slots[self.slot_of[block]]).items():
            put_parameter(module, name, view)

    def enter(self, block: int) -> None:
        """Before block `block` computes in a forward pass: its weights are there, and those of the next are on their way."""
        self.require(block, +1)

    def leave(self, block: int, *outputs: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """The block's outputs, through which its backward pass will find its weights there as well."""
        if not torch.is_grad_enabled() or not any(output.requires_grad for output in outputs):
            return outputs
        return _BackwardEntry.apply(self, block, *outputs)

    def require(self, block: int, direction: int) -> None:
        """Have `block` in its slot, and fetch ahead in the direction of the pass: +1 forward, −1 backward.

        Whatever was launched before this call may still read the slots that are refilled: the side stream waits for it.
        """
        if self.paused:
            return
        for ahead in self._window(block, direction):
            if self.holds[self.slot_of[ahead]] != ahead:
                self._refill(ahead)
        if block not in self.slot_of:
            return
        slot = self.slot_of[block]
        assert self.holds[slot] == block, f"slot {slot} holds block {self.holds[slot]}, not {block}"
        self._wait(slot)

    def have(self, holds: Sequence[int | None]) -> None:
        """Have these blocks in the slots, one each: what a graph that is about to be launched was recorded with."""
        for slot, block in enumerate(holds):
            if block is not None and self.holds[slot] != block:
                self._refill(block)
            self._wait(slot)

    @contextmanager
    def recorded(self) -> Iterator[None]:
        """Inside, a CUDA graph is being captured: fetches become part of it, and have ended where it ends.

        Nothing is fetched in truth, so what the slots hold afterwards is for the caller to say (`have`, `forget`).
        """
        self.arrived = [None] * len(self.slots)  # events from outside mean nothing inside, nor the other way round
        before = self.fetches
        try:
            yield
        finally:  # a capture that ends with an error must not leave the side stream in it
            if self.side is not None and self.fetches > before:
                torch.cuda.current_stream(self.device).wait_stream(self.side)
            self.arrived = [None] * len(self.slots)

    def forget(self) -> None:
        """Take the contents of all slots for unknown."""
        self.holds = [None] * len(self.slots)

    def _wait(self, slot: int) -> None:
        event = self.arrived[slot]
        if event is not None:
            torch.cuda.current_stream(self.device).wait_event(event)

    def _window(self, block: int, direction: int) -> Iterator[int]:
        """The streamed blocks from `block` on, as many as there are slots: nearest first."""
        found = 0
        last = self.blocks[-1] if direction > 0 else self.blocks[0]
        while found < len(self.slots) and (last - block) * direction >= 0:
            if block in self.slot_of:
                found += 1
                yield block
            block += direction

    def _refill(self, block: int) -> None:
        slot = self.slot_of[block]
        if self.side is None:
            self._fill(block, slot)
        else:
            self.side.wait_stream(torch.cuda.current_stream(self.device))
            with torch.cuda.stream(self.side):
                self._fill(block, slot)
                self.arrived[slot] = self.side.record_event()
        self.holds[slot] = block
        self.fetches += 1

    def _fill(self, block: int, slot: int) -> None:
        into = self.slots[slot]
        if self.poisoned:
            into.fill_(POISON)
        if self.decode is None:
            self.store.fetch(block, into)
        else:
            self.store.fetch(block, self.arrival)
            self.decode(block, self.arrival, into)

    @contextmanager
    def pause(self) -> Iterator[None]:
        """Passes inside fetch nothing."""
        self.paused, before = True, self.paused
        try:
            yield
        finally:
            self.paused = before


class _BackwardEntry(torch.autograd.Function):
    """The identity; its backward runs before that of the block whose outputs it was given."""

    @staticmethod
    def forward(ctx: Any, stream: BlockStream, block: int, *outputs: torch.Tensor) -> tuple[torch.Tensor, ...]:
        ctx.stream, ctx.block = stream, block
        ctx.set_materialize_grads(False)
        return tuple(output.view_as(output) for output in outputs)

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor | None) -> tuple[Any, ...]:
        ctx.stream.require(ctx.block, -1)
        return None, None, *gradients
