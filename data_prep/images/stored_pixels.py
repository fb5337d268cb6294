"""The stored image of a sample back to pixels: what training and encoding read from image shards."""

from __future__ import annotations

import io

import numpy as np


def decode_stored(data: bytes, width: int, height: int) -> np.ndarray:
    """uint8 [H, W, 3], RGB, of a shard's JPEG or PNG member. Raises ValueError when it hasn't its bucket's size."""
    pixels: np.ndarray | None = None
    if data[:2] == b"\xff\xd8":
        import simplejpeg

        try:
            pixels = simplejpeg.decode_jpeg(data, colorspace="RGB", strict=True)
        except ValueError:
            pixels = None  # CMYK and the like; Pillow decides, and says what is wrong
    if pixels is None:
        from PIL import Image

        with Image.open(io.BytesIO(data)) as image:
            pixels = np.asarray(image.convert("RGB"))
    if pixels.shape != (height, width, 3):
        raise ValueError(f"image is {pixels.shape[1]}x{pixels.shape[0]}, its bucket {width}x{height}")
    return pixels
