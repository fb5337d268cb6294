"""The stored image of a sample back to pixels: what training and encoding read from image shards."""

from __future__ import annotations

import io

import numpy as np


def decode_stored(data: bytes, width: int, height: int) -> np.ndarray:
    """uint8 [H, W, 3], RGB, of a shard's JPEG or PNG member. As strict as the packer: damaged data is an error.

    Raises ValueError with what is wrong, and for an image that hasn't its bucket's size.
    """
    from data_prep.images.corruption import strict_jpeg
    from data_prep.images.skip_reasons import BadImage, of_decoder

    pixels: np.ndarray | None = None
    try:
        if data[:2] == b"\xff\xd8":
            pixels = strict_jpeg(data)
        if pixels is None:
            pixels = _by_pillow(data)
    except BaseException as error:
        bad: BadImage = of_decoder(error)
        raise ValueError(str(bad)) from None
    if pixels.shape != (height, width, 3):
        raise ValueError(f"image is {pixels.shape[1]}x{pixels.shape[0]}, its bucket {width}x{height}")
    return pixels


def _by_pillow(data: bytes) -> np.ndarray:
    from PIL import Image

    from data_prep.images.corruption import check

    with Image.open(io.BytesIO(data), formats=("JPEG", "PNG", "WEBP")) as image:
        check(image, data)
        return np.asarray(image.convert("RGB"))
