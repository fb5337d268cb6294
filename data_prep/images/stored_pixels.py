"""The stored image of a sample, and its mask, back to pixels: what training and encoding read from image shards."""

from __future__ import annotations

import io

import numpy as np

LATENT_CELL = 8  # pixels on a side of what one position of the latent stands for (the VAE's factor)


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


def decode_mask(data: bytes, width: int, height: int) -> np.ndarray:
    """uint8 [H, W] of a shard's mask member, 255: learn. Raises ValueError for damage, another kind, another size."""
    from PIL import Image

    from data_prep.images.corruption import check
    from data_prep.images.skip_reasons import BadImage, of_decoder

    try:
        with Image.open(io.BytesIO(data), formats=("PNG",)) as image:
            check(image, data)
            if image.mode != "L":
                raise ValueError(f"of mode {image.mode}, masks in shards are grey with 8 bits")
            mask = np.asarray(image)
    except BaseException as error:
        bad: BadImage = of_decoder(error)
        raise ValueError(f"mask: {bad}") from None
    if mask.shape != (height, width):
        raise ValueError(f"mask is {mask.shape[1]}x{mask.shape[0]}, its bucket {width}x{height}")
    return mask


def latent_mask(mask: np.ndarray) -> np.ndarray:
    """uint8 [H/8, W/8]: means of a mask [H, W] over the pixels of each position of the latent, rounded.

    Encoding stores it and training makes it of images, by this one function: both have the same loss.
    """
    height, width = (side // LATENT_CELL for side in mask.shape)
    sums = mask.reshape(height, LATENT_CELL, width, LATENT_CELL).sum((1, 3), dtype=np.uint32)
    return ((sums + LATENT_CELL**2 // 2) // LATENT_CELL**2).astype(np.uint8)


def mask_share(mask: np.ndarray) -> float:
    """Mean of a mask on the latent grid, 0 … 1: 0 where all of it is black."""
    return float(mask.mean(dtype=np.float64)) / 255
