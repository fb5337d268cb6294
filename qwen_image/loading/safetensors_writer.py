"""Safetensors files written as their tensors come: one in memory at a time, and the blocks can be hashed on their way.

    layout = {"a.weight": (torch.bfloat16, (3, 4)), …}
    with whole_file(path) as file:
        for block in safetensors_blocks(layout, tensors, {"format": "pt"}):
            file.write(block)

The library's own writer wants all tensors in memory at once, writes files that only their owner can read, and would have
to be followed by a second reading for a checksum. The format: 8 bytes length (little endian), a JSON header padded to a
multiple of 8, then the tensors' bytes (huggingface.co/docs/safetensors).
"""

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch

from qwen_image.loading.safetensors_ranges import DTYPES

Layout = Mapping[str, tuple[torch.dtype, Sequence[int]]]
_NAMES = {dtype: name for name, dtype in DTYPES.items()}


def safetensors_blocks(
    layout: Layout, values: Iterable[torch.Tensor], metadata: Mapping[str, str] | None = None
) -> Iterator[bytes | memoryview]:
    """The file's bytes, block by block: the header, then those of `values`, which follow each other without gaps.

    `values` need not be cut as the layout is: one flat tensor may hold several of its tensors. A block is valid until
    the next is asked for.
    """
    yield safetensors_header(layout, metadata)
    written = 0
    for value in values:
        data = value.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data
        written += len(data)
        yield data
    assert written == data_bytes(layout), f"{written} bytes came, the layout has {data_bytes(layout)}"


def safetensors_header(layout: Layout, metadata: Mapping[str, str] | None = None) -> bytes:
    """What stands before the data, the 8 bytes of length included."""
    header: dict[str, Any] = {"__metadata__": dict(metadata)} if metadata else {}
    end = 0
    for name, (dtype, shape) in layout.items():
        start, end = end, end + torch.Size(shape).numel() * dtype.itemsize
        header[name] = {"dtype": _NAMES[dtype], "shape": list(shape), "data_offsets": [start, end]}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


def data_bytes(layout: Layout) -> int:
    """Bytes of all tensors, without the header."""
    return sum(torch.Size(shape).numel() * dtype.itemsize for dtype, shape in layout.values())
