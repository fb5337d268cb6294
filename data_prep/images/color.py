"""Pixels of any kind to 8-bit sRGB: greys of 16 bits, palettes, transparency, CMYK, and colour profiles."""

from __future__ import annotations

import functools
import io

import numpy as np
from PIL import Image, ImageCms

SRGB = ImageCms.createProfile("sRGB")


def to_rgb(
    image: Image.Image, profile: bytes | None, background: tuple[int, int, int]
) -> tuple[np.ndarray, bytes | None]:
    """Decode a Pillow image into RGB pixels [H, W, 3] uint8.

    Returns the pixels, and the profile where it is one of RGB and still to be applied (`to_srgb`); profiles of other
    colour spaces are applied here. Raises ValueError for floating-point and 32-bit pixels.
    """
    space = _colour_space(profile)
    if image.mode.startswith("I") or image.mode == "F":
        image = _eight_bits(image)
    if image.mode in ("RGBA", "RGBa", "LA", "La", "PA") or "transparency" in image.info:
        image = image.convert("RGBA")
        ground = Image.new("RGBA", image.size, (*background, 255))
        image = Image.alpha_composite(ground, image).convert("RGB")
    elif profile and space == {"CMYK": "CMYK", "L": "GRAY", "LAB": "Lab"}.get(image.mode, ""):
        image = _apply(image, profile) or image.convert("RGB")
    else:
        image = image.convert("RGB")
    return np.asarray(image), profile if space == "RGB" else None


def to_srgb(pixels: np.ndarray, profile: bytes) -> np.ndarray:
    """Convert RGB pixels [H, W, 3] uint8 from an ICC profile to sRGB; unchanged if it is sRGB or cannot be used."""
    if _is_srgb(profile):
        return pixels
    image = _apply(Image.fromarray(pixels), profile)
    return pixels if image is None else np.asarray(image)


def _eight_bits(image: Image.Image) -> Image.Image:
    """16-bit greys divided by 257 (65535 -> 255), rounded. Pillow's own conversion clips them at 255, all white."""
    values = np.asarray(image)
    if values.dtype.kind == "f" or values.min(initial=0) < 0 or values.max(initial=0) > 65535:
        raise ValueError(f"unsupported pixels: {values.dtype} from {values.min(initial=0)} to {values.max(initial=0)}")
    return Image.fromarray(((values.astype(np.uint32) + 128) // 257).astype(np.uint8))


@functools.lru_cache(maxsize=32)
def _transform(profile: bytes, mode: str) -> ImageCms.ImageCmsTransform | None:
    try:
        return ImageCms.buildTransform(
            ImageCms.ImageCmsProfile(io.BytesIO(profile)),
            SRGB,
            mode,
            "RGB",
            renderingIntent=ImageCms.Intent.RELATIVE_COLORIMETRIC,
            flags=ImageCms.Flags.BLACKPOINTCOMPENSATION,
        )
    except (ImageCms.PyCMSError, OSError, ValueError):
        return None  # a broken profile is no profile, as in browsers


def _apply(image: Image.Image, profile: bytes) -> Image.Image | None:
    transform = _transform(profile, image.mode)
    return None if transform is None else ImageCms.applyTransform(image, transform)


@functools.lru_cache(maxsize=32)
def _colour_space(profile: bytes | None) -> str:
    if not profile:
        return ""
    try:
        return ImageCms.ImageCmsProfile(io.BytesIO(profile)).profile.xcolor_space.strip()
    except (ImageCms.PyCMSError, OSError):
        return ""


@functools.lru_cache(maxsize=32)
def _is_srgb(profile: bytes) -> bool:
    """By what the profile does to the corners and greys of the cube, not by what it calls itself."""
    transform = _transform(profile, "RGB")
    if transform is None:
        return True
    levels = np.array([0, 32, 96, 160, 224, 255], np.uint8)
    cube = np.stack(np.meshgrid(levels, levels, levels), axis=-1).reshape(6, 36, 3)
    changed = np.asarray(ImageCms.applyTransform(Image.fromarray(cube), transform))
    return int(np.abs(changed.astype(int) - cube).max()) <= 2
