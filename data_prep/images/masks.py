"""Masks: which part of an image a LoRA is to learn, from a picture of its own or from the image's alpha channel.

A mask is read as a grey from 0 (leave alone) to 255 (learn), whatever kind of picture it is: colors by their luma, greys of
16 bits scaled, palettes by their colors, floats from 0 to 1; where the mask is transparent itself, it is black. Color
profiles are no part of it, since its values are no colors. It takes the image's way: turned upright, its crop box, its
size, averaged by area (enlarged: pixels are repeated).
"""

from __future__ import annotations

import io
from dataclasses import dataclass, replace

import numpy as np
from PIL import Image

from data_prep.images import color, corruption, decoder_warnings
from data_prep.images.buckets import Placement
from data_prep.images.header import (
    TURNS,
    Header,
    ImageOptions,
    Turn,
    at_once,
    header_of,
    loaded_header,
    open_image,
)
from data_prep.images.skip_reasons import CANNOT_DECODE, FAILED, MASK_SIZE, BadImage, of_decoder
from data_prep.images.stored_pixels import latent_mask, mask_share

BLACK = (0, 0, 0)


@dataclass(frozen=True)
class StoredMask:
    """A mask as it goes into a shard."""

    data: bytes  # grey PNG of the image's size
    share: float  # its mean on the latent grid: 0 is all black
    turned: bool = False  # by the image's orientation, which the mask itself doesn't tell
    sha256: str = ""  # of its file; "" of an alpha channel


def orientation_of(mask: Header, size: tuple[int, int], orientation: int) -> int:
    """The EXIF orientation by which a mask is turned, of an image of `size`, upright, and `orientation`: its own.

    A mask that says none, drawn on the pixels of an image as they lie in its file, is turned as that is. Raises BadImage where
    the sides have another ratio than the image's, beyond rounding.
    """
    if same_ratio((mask.width, mask.height), size):
        return mask.orientation
    turned = TURNS[orientation][0] % 2 == 1
    if mask.orientation == 1 and turned and same_ratio((mask.height, mask.width), size):
        return orientation
    raise BadImage(FAILED, MASK_SIZE, f"{mask.width}x{mask.height}, its image {size[0]}x{size[1]}")


def check_decoded(mask: bytes, image: bytes, options: ImageOptions) -> None:
    """`orientation_of` with the headers of what is decoded, where EXIF data may stand behind the pixels. Raises BadImage."""
    headers = []
    for data in (mask, image):
        with decoder_warnings.collected([]), open_image(io.BytesIO(data), options) as opened:
            headers.append(loaded_header(opened, header_of(opened)))
    orientation_of(headers[0], (headers[1].width, headers[1].height), headers[1].orientation)


def same_ratio(one: tuple[int, int], other: tuple[int, int]) -> bool:
    """Whether two sizes are the same picture at two scales: each side of the smaller may be rounded by a pixel."""
    return abs(one[0] * other[1] - one[1] * other[0]) <= max(*one, *other)


def store_mask(
    data: bytes,
    size: tuple[int, int],
    orientation: int,
    placement: Placement,
    options: ImageOptions,
    turn: Turn = at_once,
) -> StoredMask:
    """The mask in `data` of an image of `size` (upright) and EXIF `orientation`, put where the image was. Raises BadImage."""
    try:
        with decoder_warnings.collected([]), open_image(io.BytesIO(data), options) as image:
            header = header_of(image)
            with turn(header.memory):
                header = loaded_header(image, header)
                own = orientation_of(header, size, orientation)
                grey = _upright(_grey(data, image, options), own)
                return _stored(grey, size, placement, turned=own != header.orientation)
    except BaseException as error:
        raise of_decoder(error) from None


def store_alpha(data: bytes, header: Header, placement: Placement, options: ImageOptions) -> StoredMask:
    """The alpha channel of the image in `data`, which has one, as its mask. Raises what a decoder raises."""
    with open_image(io.BytesIO(data), options) as image:
        image.load()
        alpha = np.asarray(color.alpha(image, color.Source.of(image, data)))
    return _stored(_upright(alpha, header.orientation), (header.width, header.height), placement)


def _grey(data: bytes, image: Image.Image, options: ImageOptions) -> np.ndarray:
    """uint8 [H, W] as it lies in the file."""
    if image.format in ("JPEG", "MPO") and image.mode in ("RGB", "L"):
        try:
            pixels = corruption.strict_jpeg(data, "GRAY")
            if pixels is not None:
                return pixels[..., 0]
        except BadImage:
            if options.on_corrupt == "fail":
                raise
    elif options.on_corrupt == "fail":
        corruption.check(image, data)
    image.load()
    if image.mode == "F":
        return _from_floats(np.asarray(image))
    source = replace(color.Source.of(image, data), profile=None, gamma=None)
    pixels, _ = color.to_rgb(image, source, BLACK)
    return np.asarray(Image.fromarray(pixels).convert("L"))


def _from_floats(values: np.ndarray) -> np.ndarray:
    low, high = float(values.min()), float(values.max())
    if not (low >= 0 and high <= 1):
        raise BadImage(FAILED, CANNOT_DECODE, f"floats from {low:g} to {high:g}, a mask has 0 to 1")
    return np.rint(values * 255).astype(np.uint8)


def _upright(pixels: np.ndarray, orientation: int) -> np.ndarray:
    quarter_turns, mirrored = TURNS[orientation]
    pixels = np.rot90(pixels, quarter_turns)
    return np.ascontiguousarray(pixels[:, ::-1] if mirrored else pixels)


def _stored(mask: np.ndarray, size: tuple[int, int], place: Placement, turned: bool = False) -> StoredMask:
    """Cropped and scaled in one step, the box in the mask's own pixels where it is of another scale than the image."""
    across, down = mask.shape[1] / size[0], mask.shape[0] / size[1]
    right, bottom = place.crop_left + place.crop_width, place.crop_top + place.crop_height
    box = place.crop_left * across, place.crop_top * down, right * across, bottom * down
    scaled = Image.fromarray(mask).resize((place.width, place.height), Image.Resampling.BOX, box=box)
    out = io.BytesIO()
    scaled.save(out, "PNG")
    return StoredMask(out.getvalue(), mask_share(latent_mask(np.asarray(scaled))), turned)
