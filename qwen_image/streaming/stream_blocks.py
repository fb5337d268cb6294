"""Which blocks of a transformer are streamed, from where, in which storage; and the loading that puts them there.

homes = BlockHomes(on_device=frozenset({0, 30}), storage="computed")
transformer = load_streamed(files, torch.bfloat16, device, homes, base_float8=True, sigmas=sigmas)
"""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

import torch
import torch.distributed as dist

from qwen_image.float8.linear import block_linears
from qwen_image.float8.scaled_rows import FLOAT8
from qwen_image.loading.model_files import ModelFiles
from qwen_image.loading.staged import TABULATED, Change, Readers, load_staged
from qwen_image.loading.weights import empty_transformer
from qwen_image.model.transformer import QwenImageTransformer
from qwen_image.streaming.block_layout import BlockLayout, frozen_matrices
from qwen_image.streaming.block_store import BlockStore
from qwen_image.streaming.block_stream import SLOTS, BlockStream
from qwen_image.streaming.int8_storage import decode, encode, group_of

Storage = Literal["computed", "int8"]
SCALE = ".scale"  # the name of a stored matrix's scales


@dataclass(frozen=True)
class BlockHomes:
    """Where the frozen matrices of a transformer's blocks lie.

    Attributes:
        on_device: blocks whose bytes stay on the device; in the storage that they are computed with they need no slot.
        group: ranks that keep one copy of all others between them; None: each has its own, in host memory.
        host: the parts of a group lie in host memory; else on the devices.
        storage: "computed" is what kernels read; "int8" becomes that on arrival (int8_storage.py).
        slots: buffers on the device for blocks that come and go.
        pinned: host memory is page-locked.
    """

    on_device: frozenset[int] = frozenset()
    group: dist.ProcessGroup | None = None
    host: bool = True
    storage: Storage = "computed"
    slots: int = SLOTS
    pinned: bool = True


def load_streamed(
    files: ModelFiles,
    dtype: torch.dtype,
    device: torch.device,
    homes: BlockHomes,
    *,
    base_float8: bool = False,
    sigmas: Iterable[float] | None = None,
    change: Change | None = None,
    progress: bool = False,
    readers: Readers | None = None,
) -> QwenImageTransformer:
    """The frozen transformer with its blocks where `homes` says; the arguments are those of `load_staged`."""
    empty = empty_transformer(files)
    of_slots = block_layouts(empty, dtype, base_float8, tabulated=sigmas is not None)
    layouts = {
        block: layout for block, layout in of_slots.items() if homes.storage == "int8" or block not in homes.on_device
    }
    if not layouts:
        options = {"base_float8": base_float8, "sigmas": sigmas, "change": change, "progress": progress}
        return load_staged(files, dtype, device, readers=readers, **options)  # type: ignore[arg-type]
    stored = {block: stored_layout(layout) for block, layout in layouts.items()} if homes.storage == "int8" else layouts
    in_group = homes.group is not None and not homes.host
    store = BlockStore(
        device,
        {block: layout.size for block, layout in stored.items()},
        frozenset(layouts) if in_group else homes.on_device & frozenset(layouts),
        homes.group,
        homes.pinned,
    )
    arrive = None
    if homes.storage == "int8":

        def arrive(block: int, bytes_: torch.Tensor, slot: torch.Tensor) -> None:
            decode_block(stored[block], layouts[block], bytes_, slot)

    stream = BlockStream(layouts, store, device, homes.slots, arrive)

    def keep(transformer: QwenImageTransformer, block: int) -> None:
        if block not in layouts:
            return
        module = transformer.transformer_blocks[block]
        flat = torch.zeros(stored[block].size, dtype=torch.uint8, device=device)
        views = stored[block].views(flat)
        for name, parameter in list(frozen_matrices(module)):
            if homes.storage == "int8":
                views[name].copy_((coded := encode(parameter.data))[0])
                views[name + SCALE].copy_(coded[1])
            else:
                views[name].copy_(parameter.data)
        store.put(block, flat)
        stream.bind_block(block, module)

    transformer = load_staged(
        files,
        dtype,
        device,
        base_float8=base_float8,
        sigmas=sigmas,
        change=change,
        progress=progress,
        readers=readers,
        finished=keep,
    )
    transformer.block_stream = stream
    return transformer


def block_layouts(
    transformer: QwenImageTransformer, dtype: torch.dtype, base_float8: bool, tabulated: bool
) -> dict[int, BlockLayout]:
    """The layout of every block's matrices as kernels read them, from a transformer on the meta device."""
    float8 = {f"{name}.weight" for name, _ in block_linears(transformer)} if base_float8 else set()
    layouts = {}
    for index, block in enumerate(transformer.transformer_blocks):
        matrices = {
            name: (parameter.shape, FLOAT8 if f"transformer_blocks.{index}.{name}" in float8 else dtype)
            for name, parameter in block.named_parameters()
            if parameter.ndim == 2 and not (tabulated and name.split(".")[0] in TABULATED)
        }
        layouts[index] = BlockLayout.of(matrices)
    return layouts


def stored_layout(computed: BlockLayout) -> BlockLayout:
    """What a block takes in int8: the integers, then the scales, of each matrix."""
    integers = {piece.name: (piece.shape, torch.int8) for piece in computed.pieces}
    scales = {
        piece.name + SCALE: (torch.Size((piece.shape[0], piece.shape[1] // group_of(piece.shape[1]))), piece.dtype)
        for piece in computed.pieces
    }
    return BlockLayout.of(integers | scales)


def decode_block(stored: BlockLayout, computed: BlockLayout, arrived: torch.Tensor, slot: torch.Tensor) -> None:
    """A block's int8 bytes into its slot."""
    values = stored.views(arrived)
    for name, target in computed.views(slot).items():
        decode(values[name], values[name + SCALE], target)
