"""Pixels of any kind to 8-bit sRGB: greys of 16 bits, palettes, transparency, CMYK, ICC profiles and PNG's gamma.

A profile counts when it is of the image's own color space; a grey image may have an RGB one (cameras and web services
write sRGB's into grey JPEGs). Which is used:

    image \\ profile     RGB                 GRAY        CMYK       Lab        none, or broken
    RGB, palette        applied             –           –          –          as it is (PNG: its gamma is applied)
    grey                applied as R=G=B    applied     –          –          as it is (PNG: its gamma is applied)
    CMYK                –                   –           applied    –          255 - min(255, ink + black), as Pillow does it
    Lab                 –                   –           –          applied    as D50 Lab

Transparent pixels are converted first and then laid over the background, which is given in sRGB.
"""

from __future__ import annotations

import functools
import io
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from PIL import Image, ImageCms

SRGB = ImageCms.createProfile("sRGB")
SRGB_GAMMA = 0.45455  # as PNG's gAMA spells it
STRIP_BYTES = 1 << 22  # pixels are converted in strips, so that a large image is in memory once and not four times
ALPHA_MODES = ("RGBA", "RGBa", "LA", "La", "PA")


@dataclass(frozen=True)
class Source:
    """What a file says of its pixels beyond Pillow's mode."""

    profile: bytes | None = None  # ICC
    gamma: float | None = None  # PNG's gAMA, where nothing else says what the values mean
    bits: int = 8  # of a sample in the file
    grey: bool = False  # whatever Pillow's mode: it opens grey PNGs with alpha of 16 bits as RGBA
    white_is_zero: bool = False  # TIFF; Pillow inverts up to 8 bits itself
    transparent: int | tuple[int, ...] | None = None  # PNG's tRNS of grey and RGB images, in the file's bits

    @classmethod
    def of(cls, image: Image.Image, data: bytes) -> Source:
        """Of an opened Pillow image and the bytes it was opened from."""
        info = image.info
        profile = info.get("icc_profile") or None
        gamma = None if profile or "srgb" in info or image.format != "PNG" else info.get("gamma")
        bits, grey, white_is_zero, transparent = 8, False, False, None
        if image.format == "PNG":
            bits, grey = data[24], data[25] in (0, 4)  # IHDR: bit depth, color type
            value = info.get("transparency")
            transparent = value if not isinstance(value, bytes) and image.mode != "P" else None
        elif image.format == "TIFF":
            tags = image.tag_v2  # type: ignore[attr-defined]
            samples = tags.get(258, (1,))
            bits = samples[0] if isinstance(samples, tuple) else samples
            white_is_zero = tags.get(262) == 0
        return cls(profile, gamma, bits, grey, white_is_zero, transparent)


def to_rgb(
    image: Image.Image, source: Source, background: tuple[int, int, int]
) -> tuple[np.ndarray, Callable[[np.ndarray], np.ndarray] | None]:
    """Decode a Pillow image into pixels [H, W, 3] uint8, and free it.

    Returns the pixels, and what still turns them into sRGB: for images without transparency that is left for after the
    resize, when there are fewer pixels. Raises ValueError for floating-point and 32-bit pixels.
    """
    convert, later = _conversion(image, source, background)
    width, height = image.size
    pixels = np.empty((height, width, 3), np.uint8)
    rows = max(1, STRIP_BYTES // (4 * width))
    for top in range(0, height, rows):
        bottom = min(height, top + rows)
        pixels[top:bottom] = convert(image.crop((0, top, width, bottom)))
    image.close()
    return pixels, later


def _conversion(
    image: Image.Image, source: Source, background: tuple[int, int, int]
) -> tuple[Callable[[Image.Image], np.ndarray], Callable[[np.ndarray], np.ndarray] | None]:
    """Strip -> RGB pixels for this kind of image, and what is left for later."""
    mode, space = image.mode, _color_space(source.profile)
    grey = source.grey or (mode[0] in "1LI" and mode != "LAB")
    if mode == "F" or (mode == "I" and not _is_16_bit(image)):
        low, high = image.getextrema()
        raise ValueError(f"unsupported pixels: {'float32' if mode == 'F' else 'int32'} from {low} to {high}")
    eight = _eight_bits(source) if mode.startswith("I") else None
    native = source.profile if space == {"C": "CMYK", "L": "GRAY"}.get(mode[0], "") and mode != "LAB" else None
    if grey and space == "GRAY":
        native = source.profile
    if mode == "LAB" and space == "Lab":
        native = source.profile
    after = None
    if space == "RGB" and mode not in ("CMYK", "LAB"):
        after = by_profile(source.profile or b"")
    elif source.gamma:
        after = _by_gamma(source.gamma)

    def opaque(strip: Image.Image) -> Image.Image:
        if native:
            strip = strip.convert("L") if grey else strip
            return _apply(strip, native) or strip.convert("RGB")
        return strip.convert("RGB")

    if mode in ALPHA_MODES or "transparency" in image.info:

        def composited(strip: Image.Image) -> np.ndarray:
            color, alpha = _split_alpha(strip, source, eight)
            rgb = np.asarray(opaque(color))
            rgb = after(rgb) if after else rgb
            ground = Image.new("RGB", strip.size, background)
            return np.asarray(Image.composite(Image.fromarray(rgb), ground, alpha))

        return composited, None
    return lambda strip: np.asarray(opaque(eight(strip) if eight else strip)), after


def alpha(image: Image.Image, source: Source) -> Image.Image:
    """The opacity of a decoded Pillow image of which pixels may be transparent, mode L."""
    return _split_alpha(image, source, _eight_bits(source) if image.mode.startswith("I") else None)[1]


def _split_alpha(
    strip: Image.Image, source: Source, eight: Callable[[Image.Image], Image.Image] | None
) -> tuple[Image.Image, Image.Image]:
    """(color without alpha, alpha in mode L) of a strip. PNG's one transparent color is compared in the file's bits."""
    if source.transparent is not None and strip.mode not in ALPHA_MODES:
        # Pillow scales greys of 1 to 4 bits up to 8, and halves colors of 16 bits, but not the value to compare with.
        values = np.asarray(strip.convert("L") if strip.mode == "1" else strip).astype(np.int32)
        wanted = np.atleast_1d(source.transparent)
        if source.bits < 8:
            wanted = wanted * (255 // (2**source.bits - 1)) if strip.mode != "1" else (wanted > 0) * 255
        elif source.bits == 16 and strip.mode == "RGB":
            wanted = wanted >> 8
        same = values == wanted if values.ndim == 2 else (values == wanted).all(axis=-1)
        color = eight(strip) if eight else strip.copy()
        color.info.pop("transparency", None)
        return color, Image.fromarray(np.where(same, 0, 255).astype(np.uint8))
    if strip.mode in ("LA", "La"):
        strip = strip.convert("LA")
        return strip.getchannel("L"), strip.getchannel("A")
    rgba = strip.convert("RGBA")
    return rgba.convert("RGB"), rgba.getchannel("A")


def _is_16_bit(image: Image.Image) -> bool:
    low, high = image.getextrema()
    return low >= 0 and high <= 65535  # type: ignore[operator]


def _eight_bits(source: Source) -> Callable[[Image.Image], Image.Image]:
    """Greys of 9 to 16 bits to 8, rounded: 65535 (or 4095 of 12 bits) -> 255. Pillow's own conversion clips them, all white."""
    top = 2**source.bits - 1 if 8 < source.bits < 16 else 65535

    def convert(strip: Image.Image) -> Image.Image:
        values = np.asarray(strip).astype(np.uint32)
        values = ((values * 255 + top // 2) // top).clip(0, 255).astype(np.uint8)
        return Image.fromarray(255 - values if source.white_is_zero else values)

    return convert


# ── profiles and gamma ───────────────────────────────────────────────────────────────────────────────────────────────


def grey_profile(profile: bytes | None) -> bool:
    """Whether it is one of grey, which must be applied before the image becomes RGB."""
    return _color_space(profile) == "GRAY"


def by_profile(profile: bytes) -> Callable[[np.ndarray], np.ndarray] | None:
    """What turns RGB pixels [H, W, 3] uint8 of an ICC profile into sRGB; None if it is sRGB or cannot be used."""
    if _color_space(profile) != "RGB" or _is_srgb(profile):
        return None

    def convert(pixels: np.ndarray) -> np.ndarray:
        image = _apply(Image.fromarray(pixels), profile)
        return pixels if image is None else np.asarray(image)

    return convert


def _by_gamma(gamma: float) -> Callable[[np.ndarray], np.ndarray] | None:
    """From PNG's gAMA (sample = light ** gamma) to sRGB's curve (IEC 61966-2-1)."""
    if not 0.01 < gamma < 10 or abs(gamma - SRGB_GAMMA) < 0.01:
        return None
    light = (np.arange(256) / 255) ** (1 / gamma)
    curve = np.where(light <= 0.0031308, 12.92 * light, 1.055 * light ** (1 / 2.4) - 0.055)
    table = np.rint(curve * 255).astype(np.uint8)
    return lambda pixels: table[pixels]


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
def _color_space(profile: bytes | None) -> str:
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
