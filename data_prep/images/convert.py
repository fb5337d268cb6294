"""One image: source bytes -> upright sRGB -> its bucket -> encoded bytes; and every way in which that can fail.

Everything a bad image can do ends in BadImage (skip_reasons.py) with a short reason that can be counted.
"""

from __future__ import annotations

import io
import os
import sys
import threading
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import simplejpeg
from PIL import Image, ImageOps

from data_prep.images import color, corruption, decoder_warnings
from data_prep.images.buckets import Placement
from data_prep.images.header import (
    TURNS,
    Header,
    ImageOptions,
    Turn,
    at_once,
    header_of,
    judge,
    loaded_header,
    looks_copied,
    open_image,
)
from data_prep.images.masks import StoredMask, store_alpha
from data_prep.images.resizing import resize
from data_prep.images.skip_reasons import BadImage, of_decoder

END_OF_JPEG = b"\xff\xd9"
MAX_SCRATCH = 150_000_000  # bytes: photographs of 50 MP
_memory = threading.local()


@dataclass(frozen=True)
class Stored:
    """An image as it goes into a shard."""

    data: bytes
    placement: Placement
    original_width: int  # pixels, upright
    original_height: int
    frames: int
    copied: bool  # the source's bytes, unchanged
    warnings: tuple[str, ...] = ()  # of the decoder
    sha256: str = ""  # of the source's bytes; where it is set, of a source image of a pair
    sources: tuple[Stored, ...] = ()  # of the target of a pair
    orientation: int = 1  # EXIF's, of the source
    mask: StoredMask | None = None


def store(data: bytes, options: ImageOptions, turn: Turn = at_once) -> Stored:
    """Turn, resize, crop, convert to sRGB and encode one image; its bytes are copied where none of that is needed.

    The same bytes come out whatever the number of processes, which may wait for each other's large images at `turn`.
    Raises BadImage.
    """
    warned: list[str] = []
    native = data[:4] in (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+")  # libtiff writes to the error stream itself
    try:
        with (
            decoder_warnings.collected(warned, native),
            open_image(io.BytesIO(data), options) as image,
        ):
            header = header_of(image)
            with turn(header.memory):
                header = loaded_header(image, header)
                placement = judge(header.width, header.height, header.frames, options)
                # A file that was cut off has no end mark; one with something behind it is encoded anew, to be sure.
                copied = looks_copied(header, placement, options) and data.endswith(END_OF_JPEG)
                pixels, later = _decode(data, image, header, options, warned)
                copied = copied and not warned
                encoded = data if copied else encode(_fit(pixels, later, header, placement, options), options)
                alpha = options.mask_from_alpha and header.alpha
                mask = store_alpha(data, header, placement, options) if alpha else None
    except BaseException as error:
        raise of_decoder(error) from None
    size = header.width, header.height
    orientation = header.orientation
    return Stored(encoded, placement, *size, header.frames, copied, tuple(warned), orientation=orientation, mask=mask)


def perceptual_hash(data: bytes, options: ImageOptions) -> str:
    """64-bit DCT hash (16 hexadecimal digits) of the upright image. Raises BadImage."""
    import imagehash

    try:
        with decoder_warnings.collected([], True), open_image(io.BytesIO(data), options) as image:
            turned = ImageOps.exif_transpose(image)
            return str(imagehash.phash(turned.convert("RGB")))
    except BaseException as error:
        raise of_decoder(error) from None


Later = Callable[[np.ndarray], np.ndarray] | None


def _decode(
    data: bytes, image: Image.Image, header: Header, options: ImageOptions, warned: list[str]
) -> tuple[np.ndarray, Later]:
    """Pixels [H, W, 3] uint8 as they lie in the file, and what still turns them into sRGB. Raises BadImage for damage.

    Pillow decodes what the fast decoder can't do, and what it refused as damaged only where that is to be kept.
    """
    try:
        if header.format in ("JPEG", "MPO") and header.mode in ("RGB", "L"):
            grey = header.mode == "L" and color.grey_profile(header.profile)
            scratch = None if grey else _scratch(header.width * header.height * 3)
            pixels = corruption.strict_jpeg(data, "GRAY" if grey else "RGB", scratch)
            if pixels is not None and not grey:
                return pixels, color.by_profile(header.profile) if header.profile else None
            if pixels is not None:
                return color.to_rgb(Image.fromarray(pixels[..., 0]), color.Source(header.profile), options.background)
        else:
            corruption.check(image, data)
    except BadImage as damage:
        if options.on_corrupt == "fail":
            raise
        warned.append(f"{damage}; kept")
    image.load()
    return color.to_rgb(image, color.Source.of(image, data), options.background)


def _fit(pixels: np.ndarray, later: Later, header: Header, placement: Placement, options: ImageOptions) -> np.ndarray:
    """Turned upright, cropped, scaled, in sRGB."""
    quarter_turns, mirrored = TURNS[header.orientation]
    if quarter_turns or mirrored:
        pixels = np.rot90(pixels, quarter_turns)
        pixels = np.ascontiguousarray(pixels[:, ::-1] if mirrored else pixels)
    assert pixels.shape == (header.height, header.width, 3), (pixels.shape, header)
    pixels = resize(pixels, placement, options.resize)
    # After the resize, on fewer pixels: both spaces are gamma-encoded, and which is averaged in cannot be seen.
    return later(pixels) if later is not None else pixels


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


def one_thread() -> None:
    """Called at the start of a worker: one thread each, because there are as many workers as cores."""
    os.environ["OMP_NUM_THREADS"] = "1"  # read by torch when it is imported
    if torch := sys.modules.get("torch"):
        torch.set_num_threads(1)
