"""One image: source bytes -> upright sRGB -> its bucket -> encoded bytes; and every way in which that can fail.

Everything a bad image can do ends in BadImage with a short reason that can be counted.
"""

from __future__ import annotations

import io
import os
import sys
import threading
import warnings
from dataclasses import dataclass, field
from typing import IO, Any

import numpy as np
import simplejpeg
from PIL import Image, ImageOps, UnidentifiedImageError

from data_prep.images import color as colour
from data_prep.images.buckets import BucketOptions, Placement, place
from data_prep.images.resizing import resize

Image.MAX_IMAGE_PIXELS = None  # read_header refuses large images, from --max_image_pixels, before anything is decoded

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
END_OF_JPEG = b"\xff\xd9"
MAX_SCRATCH = 150_000_000  # bytes: photographs of 50 MP
_memory = threading.local()


class BadImage(Exception):
    """An image that is left out. `status` is 'failed' (broken) or 'filtered' (fine, but not wanted)."""

    def __init__(self, status: str, reason: str, detail: str = "") -> None:
        super().__init__(f"{reason}: {detail}" if detail else reason)
        self.status, self.reason, self.detail = status, reason, detail

    def __reduce__(self) -> tuple[type[BadImage], tuple[str, str, str]]:
        return BadImage, (self.status, self.reason, self.detail)


@dataclass(frozen=True)
class ImageOptions:
    """How images are judged, resized and encoded."""

    buckets: BucketOptions = field(default_factory=BucketOptions)
    format: str = "jpg"  # jpg | png
    quality: int = 95  # of jpg, with all the colour samples (4:4:4)
    background: tuple[int, int, int] = (255, 255, 255)  # what shows through transparent pixels, sRGB
    max_image_pixels: int = 200_000_000  # 600 MB once decoded
    min_pixels: int = 0
    on_animation: str = "first"  # first | reject
    resize: str = "torch"  # torch | pillow

    def __post_init__(self) -> None:
        for flag, value, low, high in (("quality", self.quality, 1, 100), ("min_pixels", self.min_pixels, 0, 10**12)):
            if not low <= value <= high:
                raise ValueError(f"--{flag} {value}: must be from {low} to {high}")
        assert self.format in ("jpg", "png") and self.on_animation in ("first", "reject"), self
        assert self.resize in ("torch", "pillow"), self


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


@dataclass(frozen=True)
class Stored:
    """An image as it goes into a shard."""

    data: bytes
    placement: Placement
    original_width: int  # pixels, upright
    original_height: int
    frames: int
    copied: bool  # the source's bytes, unchanged


# ── judging ──────────────────────────────────────────────────────────────────────────────────────────────────────────


def read_header(source: IO[bytes], options: ImageOptions) -> Header:
    """Size and kind of an image from its first bytes, without decoding it.

    A PNG whose EXIF data stands behind its pixels counts as upright here; `store` reads that too. Raises BadImage.
    """
    with _open(source, options) as image:
        return _header(image)


def read_size(data: bytes, options: ImageOptions) -> tuple[int, int]:
    """Width and height as the pixels lie in the file, which is how a trainer decodes them. Raises BadImage."""
    with _open(io.BytesIO(data), options) as image:
        return image.size


def judge(width: int, height: int, frames: int, options: ImageOptions) -> Placement:
    """Bucket and crop box of an upright image. Raises BadImage when a filter leaves it out."""
    if frames > 1 and options.on_animation == "reject":
        raise BadImage("filtered", "animated", f"{frames} frames")
    if width * height < options.min_pixels:
        raise BadImage(
            "filtered", "too few pixels", f"{width}x{height} has less than --min_pixels {options.min_pixels}"
        )
    limit = options.buckets.max_aspect_ratio
    if max(width, height) > limit * min(width, height):
        raise BadImage("filtered", "extreme aspect ratio", f"{width}x{height} is beyond {float(limit):g}:1")
    placement = place(width, height, options.buckets)
    if placement is None:
        fixed = options.buckets.fixed
        target = f"{fixed[0]}x{fixed[1]}" if fixed else "the smallest bucket"
        upscale = float(options.buckets.max_upscale)
        raise BadImage(
            "filtered", "too small", f"{width}x{height} fills {target} only beyond --max_upscale {upscale:g}"
        )
    return placement


def _open(source: IO[bytes], options: ImageOptions) -> Image.Image:
    start = source.read(64)
    if not start:
        raise BadImage("failed", "empty file")
    source.seek(0)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # odd metadata; what matters of it raises
            image = Image.open(source)
    except UnidentifiedImageError:
        raise BadImage("failed", "not an image", f"starts with {start.lstrip()[:24]!r}") from None
    except Exception as error:  # a plugin's parser on hostile bytes may raise anything
        raise BadImage("failed", "cannot decode", _line(error)) from None
    width, height = image.size
    if width * height > options.max_image_pixels:
        limit = options.max_image_pixels / 1e6
        raise BadImage(
            "failed", "too many pixels", f"{width}x{height} is {width * height / 1e6:.1f} MP, limit {limit:g} MP"
        )
    return image


def _header(image: Image.Image) -> Header:
    try:
        # Pillow turns TIFFs itself. Its PNG getexif() decodes the pixels to reach EXIF data that may stand behind them.
        decoded = getattr(image, "fp", None) is None
        readable = image.format != "TIFF" and (image.format != "PNG" or "exif" in image.info or decoded)
        orientation = image.getexif().get(0x0112, 1) if readable else 1
    except Exception:  # broken EXIF data says nothing of the pixels
        orientation = 1
    orientation = orientation if orientation in TURNS else 1
    frames = 1 if image.format == "MPO" else getattr(image, "n_frames", 1)  # MPO: a photo with its depth map or preview
    width, height = image.size if TURNS[orientation][0] % 2 == 0 else image.size[::-1]
    return Header(width, height, image.format or "", image.mode, orientation, frames, image.info.get("icc_profile"))


# ── storing ──────────────────────────────────────────────────────────────────────────────────────────────────────────


def store(data: bytes, options: ImageOptions) -> Stored:
    """Turn, resize, crop, convert to sRGB and encode one image; its bytes are copied where none of that is needed.

    The same bytes come out whatever the number of processes. Raises BadImage.
    """
    with _open(io.BytesIO(data), options) as image:
        try:
            header = _header(image)
            if header.format == "PNG" and "exif" not in image.info:
                image.load()
                header = _header(image)
            placement = judge(header.width, header.height, header.frames, options)
            # A file that was cut off has no end mark; one with something behind the mark is decoded, to be sure.
            copied = looks_copied(header, placement, options) and data.endswith(END_OF_JPEG)
            encoded = data if copied else _convert(data, image, header, placement, options)
        except BadImage:
            raise
        except MemoryError:
            raise BadImage("failed", "cannot decode", "out of memory") from None
        except Exception as error:  # codecs raise OSError, SyntaxError, struct.error, ... on hostile bytes
            line = _line(error)
            truncated = any(word in line.lower() for word in ("truncated", "premature", "eof", "broken data stream"))
            raise BadImage("failed", "truncated image" if truncated else "cannot decode", line) from None
    return Stored(encoded, placement, header.width, header.height, header.frames, copied)


def looks_copied(header: Header, placement: Placement, options: ImageOptions) -> bool:
    """Whether the header leaves nothing to change: an upright RGB JPEG without profile, of the bucket's size."""
    same_size = (header.width, header.height) == (placement.width, placement.height)
    plain = header.format == "JPEG" and header.mode == "RGB" and header.orientation == 1 and not header.profile
    return same_size and plain and options.format == "jpg"


def perceptual_hash(data: bytes, options: ImageOptions) -> str:
    """64-bit DCT hash (16 hexadecimal digits) of the upright image. Raises BadImage."""
    import imagehash

    with _open(io.BytesIO(data), options) as image:
        try:
            turned = ImageOps.exif_transpose(image)
            return str(imagehash.phash(turned.convert("RGB")))
        except Exception as error:
            raise BadImage("failed", "cannot decode", _line(error)) from None


def _convert(data: bytes, image: Image.Image, header: Header, placement: Placement, options: ImageOptions) -> bytes:
    pixels, profile = _decode(data, image, header, options)
    quarter_turns, mirrored = TURNS[header.orientation]
    if quarter_turns or mirrored:
        pixels = np.rot90(pixels, quarter_turns)
        pixels = np.ascontiguousarray(pixels[:, ::-1] if mirrored else pixels)
    assert pixels.shape == (header.height, header.width, 3), (pixels.shape, header)
    pixels = resize(pixels, placement, options.resize)
    # After the resize, on fewer pixels: both spaces are gamma-encoded, and which is averaged in cannot be seen.
    if profile is not None:
        pixels = colour.to_srgb(pixels, profile)
    return encode(pixels, options)


def _decode(data: bytes, image: Image.Image, header: Header, options: ImageOptions) -> tuple[np.ndarray, bytes | None]:
    """Pixels [H, W, 3] uint8 as they lie in the file, and the RGB profile that is still to be applied."""
    if header.format in ("JPEG", "MPO") and header.mode in ("RGB", "L"):
        try:
            profile = header.profile if header.mode == "RGB" else None
            return simplejpeg.decode_jpeg(data, "RGB", buffer=_scratch(header.width * header.height * 3)), profile
        except ValueError:
            pass  # it is strict; Pillow forgives stray bytes and refuses what is cut off
    image.load()
    return colour.to_rgb(image, header.profile, options.background)


def _scratch(size: int) -> np.ndarray | None:
    """Memory of this thread that every JPEG is decoded into: fresh pages for each cost a sixth of the whole way."""
    if size > MAX_SCRATCH:
        return None
    if getattr(_memory, "pixels", None) is None or len(_memory.pixels) < size:
        _memory.pixels = np.empty(size, np.uint8)
    return _memory.pixels


def encode(pixels: np.ndarray, options: ImageOptions) -> bytes:
    """Encode [H, W, 3] uint8 sRGB pixels as jpg (4:4:4) or png."""
    if options.format == "jpg":
        return simplejpeg.encode_jpeg(pixels, quality=options.quality, colorspace="RGB", colorsubsampling="444")
    out = io.BytesIO()
    Image.fromarray(pixels).save(out, "PNG")
    return out.getvalue()


# ── processes ────────────────────────────────────────────────────────────────────────────────────────────────────────


def one_thread() -> None:
    """Called at the start of a worker: one thread each, because there are as many workers as cores."""
    os.environ["OMP_NUM_THREADS"] = "1"  # read by torch when it is imported
    if torch := sys.modules.get("torch"):
        torch.set_num_threads(1)


def _line(error: Any) -> str:
    text = str(error).strip() or type(error).__name__
    return " ".join(text.split())[:200]
