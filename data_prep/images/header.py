"""What an image says of itself before it is decoded, and what that decides: left out, or which bucket, how much memory."""

from __future__ import annotations

import contextlib
import io
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass, field, replace
from fractions import Fraction
from typing import IO, Any

from PIL import Image, UnidentifiedImageError

from data_prep.images import decoder_warnings, formats
from data_prep.images.buckets import BucketOptions, Placement, place
from data_prep.images.color import ALPHA_MODES
from data_prep.images.skip_reasons import (
    ANIMATED,
    CANNOT_DECODE,
    EMPTY_FILE,
    EXTREME_ASPECT_RATIO,
    FAILED,
    FILTERED,
    NO_READER,
    TOO_FEW_PIXELS,
    TOO_MANY_PIXELS,
    TOO_SMALL,
    BadImage,
    of_decoder,
)
from qwen_image.model.family import SOURCE_AREA

MAX_SIDE_PIXELS = 1 << 14  # source images may be enlarged, as inference does it, from whatever they are
Image.MAX_IMAGE_PIXELS = None  # open_image refuses large images, from --max_image_pixels, before anything is decoded

# EXIF orientation -> (quarter turns to the left, then mirrored left to right), as numpy does them. EXIF 2.32, table 6.
TURNS = {
    1: (0, False),
    2: (0, True),
    3: (2, False),
    4: (2, True),
    5: (3, True),
    6: (3, False),
    7: (1, True),
    8: (1, False),
}
# Bytes a pixel at the peak of decoding and converting, measured (bench/LOG.md, 2026-11-28): JPEG is decoded into RGB and
# may be turned; others are held as four bytes and as RGB; the last ones' decoders hold more pictures of their own.
BYTES_A_PIXEL = {"JPEG": 6, "MPO": 6, "WEBP": 20, "AVIF": 16, "HEIF": 16, "JXL": 16}
OTHER_BYTES_A_PIXEL = 8


Turn = Callable[[int], AbstractContextManager[object]]  # entered, with the bytes that it takes, to decode an image


def at_once(_memory: int) -> AbstractContextManager[object]:
    return contextlib.nullcontext()


@dataclass(frozen=True)
class ImageOptions:
    """How images are judged, resized and encoded."""

    buckets: BucketOptions = field(default_factory=BucketOptions)
    format: str = "jpg"  # jpg | png
    quality: int = 95  # of jpg, with all the color samples (4:4:4)
    background: tuple[int, int, int] = (255, 255, 255)  # what shows through transparent pixels, sRGB
    max_image_pixels: int = 200_000_000  # 0.6 GB as RGB; `Header.memory` says what decoding them takes
    min_pixels: int = 0
    on_animation: str = "first"  # first | reject
    on_corrupt: str = "fail"  # fail | keep: what a forgiving decoder makes of damaged data
    resize: str = "torch"  # torch | pillow
    source_pixels: int = SOURCE_AREA  # area of the source images of pairs; the default is inference's
    mask_from_alpha: bool = False  # the alpha channel is the mask of an image that has no other

    def __post_init__(self) -> None:
        for flag, value, low, high in (("quality", self.quality, 1, 100), ("min_pixels", self.min_pixels, 0, 10**12)):
            if not low <= value <= high:
                raise ValueError(f"--{flag} {value}: must be from {low} to {high}")
        assert self.format in ("jpg", "png") and self.on_animation in ("first", "reject"), self
        assert self.resize in ("torch", "pillow") and self.on_corrupt in ("fail", "keep"), self

    def of_target(self) -> ImageOptions:
        """For the target of a pair: the same, but stretched and not cropped."""
        return replace(self, buckets=replace(self.buckets, stretch=True))

    def at(self, area: int) -> ImageOptions:
        """For one target area of those that an image is stored at (buckets.places); 0: as it is."""
        return replace(self, buckets=replace(self.buckets, areas=(area,), every_area=False)) if area else self

    def of_source(self) -> ImageOptions:
        """For source images of pairs: as inference takes them, whatever their size."""
        buckets = replace(
            self.buckets,
            areas=(self.source_pixels,),
            fixed=None,
            stretch=True,
            max_upscale=Fraction(MAX_SIDE_PIXELS),
            every_area=False,
        )
        return replace(self, buckets=buckets, min_pixels=0, mask_from_alpha=False)


@dataclass(frozen=True)
class Header:
    """What an image says of itself before it is decoded."""

    width: int  # pixels, upright
    height: int
    format: str  # Pillow's name
    mode: str
    orientation: int  # EXIF, 1..8
    frames: int
    profile: bytes | None  # ICC
    alpha: bool = False  # pixels may be transparent

    @property
    def memory(self) -> int:
        """Bytes that decoding and converting it take at their peak, about."""
        return self.width * self.height * BYTES_A_PIXEL.get(self.format, OTHER_BYTES_A_PIXEL)


def read_header(source: IO[bytes], options: ImageOptions, warned: list[str] | None = None) -> Header:
    """Size and kind of an image from its first bytes, without decoding it; decoders' warnings go to `warned`.

    A PNG whose EXIF data stands behind its pixels counts as upright here; `convert.store` reads that too. Raises BadImage
    for whatever a decoder's parser may raise.
    """
    try:
        with decoder_warnings.collected(warned if warned is not None else []), open_image(source, options) as image:
            return header_of(image)
    except BaseException as error:
        raise of_decoder(error) from None


def read_size(data: bytes, options: ImageOptions) -> tuple[int, int]:
    """Width and height as the pixels lie in the file, which is how a trainer decodes them. Raises BadImage."""
    try:
        with decoder_warnings.collected([]), open_image(io.BytesIO(data), options) as image:
            return image.size
    except BaseException as error:
        raise of_decoder(error) from None


def open_image(source: IO[bytes], options: ImageOptions) -> Image.Image:
    """Open one of the formats that are read (`formats.read_formats`). Raises BadImage, and what a plugin may raise."""
    start = source.read(64)
    if not start:
        raise BadImage(FAILED, EMPTY_FILE)
    source.seek(0)
    try:
        image = Image.open(source, formats=formats.read_formats())
    except UnidentifiedImageError:
        raise formats.not_read(start) from None
    width, height = image.size
    if width * height > options.max_image_pixels:
        limit = options.max_image_pixels / 1e6
        raise BadImage(
            FAILED, TOO_MANY_PIXELS, f"{width}x{height} is {width * height / 1e6:.1f} MP, limit {limit:g} MP"
        )
    if image.format == "TIFF" and _is_camera_raw(image.tag_v2):  # type: ignore[attr-defined]
        raise BadImage(FILTERED, NO_READER, formats.RAW_ADVICE)
    if image.format == "TIFF" and (kind := _misread(image.tag_v2)):  # type: ignore[attr-defined]
        raise BadImage(FAILED, CANNOT_DECODE, f"{kind}: save it as TIFF of 8 bits or PNG")
    return image


def _is_camera_raw(tags: Any) -> bool:
    """DNG by its version tag; NEF, ARW and the like by a first page that says it is a preview of a sub-page."""
    return 50706 in tags or (330 in tags and bool(tags.get(254, 0) & 1))


def _misread(tags: Any) -> str:
    """The kind of a TIFF that Pillow opens and decodes into something else, without a word; "" for others."""
    bits, sample_format = (
        value if isinstance(value, tuple) else (value,) for value in (tags.get(258, 1), tags.get(339, 1))
    )
    if 2 in sample_format:  # values below zero wrap around, the others come out half as bright
        return f"unsupported pixels: signed integers of {max(bits)} bits"
    if (
        tags.get(284) == 2 and len(bits) > 1 and max(bits) > 8
    ):  # each color in a plane of its own, its bytes taken for pixels
        return f"unsupported pixels: {max(bits)} bits in {len(bits)} separate planes"
    return ""


def header_of(image: Image.Image) -> Header:
    """The header of an opened image. Raises what a decoder raises that counts the frames of a damaged file."""
    orientation = _orientation(image)
    frames = 1 if image.format == "MPO" else getattr(image, "n_frames", 1)  # MPO: a photo with its depth map or preview
    width, height = image.size if TURNS[orientation][0] % 2 == 0 else image.size[::-1]
    profile = image.info.get("icc_profile") or None
    alpha = image.mode in ALPHA_MODES or "transparency" in image.info
    return Header(width, height, image.format or "", image.mode, orientation, frames, profile, alpha)


def loaded_header(image: Image.Image, header: Header) -> Header:
    """The header of an image that is about to be decoded; a PNG is, because its EXIF data may stand behind the pixels."""
    if header.format != "PNG" or "exif" in image.info:
        return header
    image.load()
    return header_of(image)


def _orientation(image: Image.Image) -> int:
    try:
        # Pillow turns TIFFs itself, and the plugins their formats. Its PNG getexif() decodes the pixels to reach EXIF data
        # that may stand behind them.
        decoded = getattr(image, "fp", None) is None
        turned = image.format in ("TIFF", "HEIF", "JXL")
        readable = not turned and (image.format != "PNG" or "exif" in image.info or decoded)
        orientation = image.getexif().get(0x0112, 1) if readable else 1
    except Exception:  # broken EXIF data says nothing of the pixels
        return 1
    return orientation if orientation in TURNS else 1


def judge(width: int, height: int, frames: int, options: ImageOptions) -> Placement:
    """Bucket and crop box of an upright image. Raises BadImage when a filter leaves it out."""
    if frames > 1 and options.on_animation == "reject":
        raise BadImage(FILTERED, ANIMATED, f"{frames} frames")
    if width * height < options.min_pixels:
        detail = f"{width}x{height} has less than --min_pixels {options.min_pixels}"
        raise BadImage(FILTERED, TOO_FEW_PIXELS, detail)
    limit = options.buckets.max_aspect_ratio
    if max(width, height) > limit * min(width, height):
        raise BadImage(FILTERED, EXTREME_ASPECT_RATIO, f"{width}x{height} is beyond {float(limit):g}:1")
    placement = place(width, height, options.buckets)
    if placement is None:
        fixed = options.buckets.fixed
        target = f"{fixed[0]}x{fixed[1]}" if fixed else "the smallest bucket"
        upscale = float(options.buckets.max_upscale)
        detail = f"{width}x{height} fills {target} only beyond --max_upscale {upscale:g}"
        raise BadImage(FILTERED, TOO_SMALL, detail)
    return placement


def looks_copied(header: Header, placement: Placement, options: ImageOptions) -> bool:
    """Whether the header leaves nothing to change: an upright RGB JPEG without profile, of the bucket's size."""
    same_size = (header.width, header.height) == (placement.width, placement.height)
    plain = header.format == "JPEG" and header.mode == "RGB" and header.orientation == 1 and not header.profile
    return same_size and plain and options.format == "jpg"
