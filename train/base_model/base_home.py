"""Where the frozen blocks lie: all on the device, or the others in host memory or spread over ranks (`--resident_blocks`).

The base is frozen: a step needs a block's weights only while that block computes, twice. The blocks that don't stay on the
device come through a few buffers there (qwen_image/streaming/). What the DeepSpeed JSON says of parameters decides from where:
stage 2 from this rank's own copy in host memory, stage 3 from the ranks' GPUs, each of which keeps a share, and with
`offload_param` from shares in host memory.
"""

from dataclasses import dataclass

import torch.distributed as dist

from qwen_image.streaming.block_stream import SLOTS
from qwen_image.streaming.stream_blocks import BlockHomes, Storage
from train.config.zero_plan import ZeroPlan


@dataclass(frozen=True)
class BaseHome:
    """The home of a run's frozen blocks.

    Attributes:
        resident: so many blocks stay on the device, evenly spread among the others, so that these arrive while they compute.
        host: the others lie in host memory, else on devices.
        sharing: so many ranks, neighbors, keep one copy of the others between them.
        pinned: host memory is page-locked.
    """

    resident: int
    host: bool = True
    sharing: int = 1
    pinned: bool = True

    @classmethod
    def of(cls, zero: ZeroPlan, blocks: int, resident: int | None, world: int, local_world: int) -> "BaseHome":
        """What the JSON and `--resident_blocks` (None: left open) say; a copy a node where there are several.

        Raises ValueError for more resident blocks than there are, or some where the ranks keep shares.
        """
        if resident is not None and resident > blocks:
            raise ValueError(f"resident_blocks: {resident} blocks to keep on the GPU, but the model has {blocks}")
        if not zero.partitioned:
            return cls(blocks if resident is None else resident, pinned=True)
        sharing = zero.hpz if zero.hpz > 1 else world
        if zero.hpz <= 1 and local_world < world and world % local_world == 0:
            sharing = local_world
        if sharing == 1 and not zero.offload_param:
            return cls(blocks if resident is None else resident)
        return cls(resident or 0, zero.offload_param, sharing, zero.pin_param or not zero.offload_param)

    def on_device(self, blocks: int) -> frozenset[int]:
        """The numbers of the resident blocks."""
        return frozenset(place * blocks // self.resident for place in range(self.resident))

    def streamed(self, blocks: int) -> int:
        """How many blocks come and go."""
        return blocks - self.resident

    def slots(self, blocks: int) -> int:
        """Buffers of a block's size on the device."""
        return min(SLOTS, self.streamed(blocks))

    def homes(self, blocks: int, int8: bool) -> BlockHomes:
        """For the loader. A collective where ranks share: it makes their process group."""
        group = dist.new_subgroups(group_size=self.sharing)[0] if self.sharing > 1 else None
        storage: Storage = "int8" if int8 else "computed"
        return BlockHomes(self.on_device(blocks), group, self.host, storage, pinned=self.pinned)

    def line(self, blocks: int) -> str | None:
        """For people; None where all blocks stay on the device."""
        streamed = self.streamed(blocks)
        if streamed == 0:
            return None
        place = "host memory" if self.host else "the GPUs"
        among = f", a share on each of {self.sharing} ranks" if self.sharing > 1 else ""
        return f"{streamed} of {blocks} blocks of the base come from {place}{among} while they compute; {self.resident} stay"
