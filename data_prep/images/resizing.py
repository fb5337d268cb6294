"""Crop and resize: torch's kernel for 8-bit Lanczos where the installed torch has it, else Pillow's.

The two agree to rounding. torch is imported late, by the processes that resize with it.
"""

from __future__ import annotations

import numpy as np
from PIL import Image

from data_prep.images.buckets import Placement


def resize(pixels: np.ndarray, placement: Placement, backend: str) -> np.ndarray:
    """Crop [H, W, 3] uint8 to the box and scale it to the bucket with an antialiased Lanczos-3 filter."""
    left, top = placement.crop_left, placement.crop_top
    box = pixels[top : top + placement.crop_height, left : left + placement.crop_width]
    size = placement.height, placement.width
    if box.shape[:2] == size:
        return np.ascontiguousarray(box)
    if backend == "pillow":
        return np.asarray(Image.fromarray(np.ascontiguousarray(box)).resize(size[::-1], Image.Resampling.LANCZOS))
    import torch

    box = box if box.flags.writeable else box.copy()  # torch warns of memory that Pillow owns
    planes = torch.from_numpy(box).permute(2, 0, 1)[None]  # channels last in memory: no copy, and the fast kernel
    scaled = torch.nn.functional.interpolate(planes, size=size, mode="lanczos", antialias=True)
    return scaled[0].permute(1, 2, 0).contiguous().numpy()


def resize_backend() -> str:
    """'torch' where the installed torch has the fast kernel (uint8 Lanczos, which older ones lack), else 'pillow'."""
    try:
        import torch

        pixels = torch.arange(256, dtype=torch.uint8).reshape(1, 1, 16, 16).expand(1, 3, 16, 16)
        pixels = pixels.contiguous(memory_format=torch.channels_last)
        torch.nn.functional.interpolate(pixels, size=(8, 8), mode="lanczos", antialias=True)
    except (ImportError, NotImplementedError, ValueError, RuntimeError, TypeError):
        return "pillow"
    return "torch"
