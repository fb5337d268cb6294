"""One mask: read as a grey whatever it is, put exactly where its image was, refused where it can't be its image's."""

from __future__ import annotations

import io
from fractions import Fraction

import numpy as np
import pytest
from PIL import Image, ImageOps

from data_prep.images import convert, masks
from data_prep.images.buckets import BucketOptions
from data_prep.images.header import ImageOptions
from data_prep.images.skip_reasons import BadImage
from data_prep.images.stored_pixels import decode_mask, latent_mask, mask_share
from tests.helpers.photos import encoded, opened, photo

SIZE = (120, 90)
FIXED = ImageOptions(buckets=BucketOptions(fixed=(64, 48)), format="png", resize="pillow")


def shape(size: tuple[int, int] = SIZE) -> np.ndarray:
    """A ramp with a black and a white block: no two turns of it are alike."""
    mask = np.tile(np.linspace(0, 255, size[0]), (size[1], 1)).astype(np.uint8)
    mask[: size[1] // 3, : size[0] // 4] = 255
    mask[-size[1] // 4 :, size[0] // 2 :] = 0
    return mask


def saved(image: Image.Image, kind: str = "PNG", **options: object) -> bytes:
    out = io.BytesIO()
    image.save(out, kind, **options)
    return out.getvalue()


def with_mask(image: bytes, mask: bytes, options: ImageOptions = FIXED) -> tuple[convert.Stored, np.ndarray]:
    stored = convert.store(image, options)
    size = stored.original_width, stored.original_height
    found = masks.store_mask(mask, size, stored.orientation, stored.placement, options)
    return stored, decode_mask(found.data, stored.placement.width, stored.placement.height)


def grey_photo(mask: np.ndarray) -> bytes:
    """An image whose pixels are the mask's: it must come out where the mask does."""
    return saved(Image.fromarray(np.stack([mask] * 3, axis=-1)))


# ── where it goes ────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("size", [SIZE, (200, 90), (90, 200), (64, 48), (101, 77)])
def test_the_way_of_the_image(size: tuple[int, int]) -> None:
    """Cropped and scaled as its image: the two filters differ at edges, a shift by a pixel would show everywhere."""
    stored, mask = with_mask(grey_photo(shape(size)), saved(Image.fromarray(shape(size))))
    image = opened(stored.data)[..., 0].astype(int)
    assert np.abs(image - mask.astype(int)).mean() < 3
    shifted = np.abs(image[:, 1:] - mask[:, :-1].astype(int)).mean()
    assert np.abs(image - mask.astype(int)).mean() < shifted / 1.5


@pytest.mark.parametrize("scale", [0.5, 3])
def test_a_mask_of_another_scale(scale: float) -> None:
    """Half the size (rounded) or three times: the same place, to within a pixel of the smaller one."""
    other = Image.fromarray(shape()).resize((round(SIZE[0] * scale), round(SIZE[1] * scale)), Image.Resampling.BOX)
    _, whole = with_mask(encoded(photo(*SIZE)), saved(Image.fromarray(shape())))
    _, scaled = with_mask(encoded(photo(*SIZE)), saved(other))
    assert np.abs(whole.astype(int) - scaled.astype(int)).mean() < 4


@pytest.mark.parametrize("size", [(90, 120), (120, 120), (100, 90), (5, 5)])
def test_another_shape_is_refused(size: tuple[int, int]) -> None:
    with pytest.raises(BadImage, match=rf"of another shape than its image: {size[0]}x{size[1]}, its image 120x90"):
        with_mask(encoded(photo(*SIZE)), saved(Image.new("L", size)))


@pytest.mark.parametrize("size", [(60, 45), (61, 45), (59, 45), (60, 46), (121, 90), (121, 91), (40, 30), (17, 13)])
def test_rounded_sides_are_the_same_shape(size: tuple[int, int]) -> None:
    with_mask(encoded(photo(*SIZE)), saved(Image.new("L", size)))


@pytest.mark.parametrize("orientation", range(1, 9))
def test_turned_as_the_image_is(orientation: int) -> None:
    """Drawn on the upright picture, or on the pixels as they lie in the file with or without the image's own EXIF tag."""
    exif = Image.Exif()
    exif[0x0112] = orientation
    raw = Image.fromarray(shape())
    image = saved(raw.convert("RGB"), exif=exif)
    upright = ImageOps.exif_transpose(Image.open(io.BytesIO(image))).convert("L")
    size = (64, 48) if orientation < 5 else (48, 64)
    options = ImageOptions(BucketOptions(fixed=size), format="png", resize="pillow")
    _, expected = with_mask(saved(upright), saved(upright), options)
    for mask in [saved(upright), saved(raw, exif=exif), *([saved(raw)] if orientation > 4 else [])]:
        _, found = with_mask(image, mask, options)
        assert np.array_equal(found, expected)
    stored = convert.store(image, options)
    turned = masks.store_mask(saved(raw), (stored.original_width, stored.original_height), orientation,
                              stored.placement, options).turned  # fmt: skip
    assert turned == (orientation > 4)


# ── what it is made of ───────────────────────────────────────────────────────────────────────────────────────────────

EXACT = ImageOptions(buckets=BucketOptions(fixed=(112, 80), max_upscale=Fraction(4)), format="png", resize="pillow")
MASK = shape((112, 80))


def palette() -> Image.Image:
    image = Image.fromarray(255 - MASK, "L").convert("P")
    image.putpalette([255 - value for value in range(256) for _ in range(3)])
    return image


def on_nothing(mode: str) -> Image.Image:
    """White paint as opaque as the mask says."""
    white = Image.new(mode[:-1], MASK.shape[::-1], "white")
    white.putalpha(Image.fromarray(MASK))
    return white


KINDS = {
    "grey": lambda: saved(Image.fromarray(MASK)),
    "color": lambda: saved(Image.fromarray(MASK).convert("RGB")),
    "16 bits": lambda: saved(Image.fromarray(MASK.astype(np.uint16) * 257)),
    "16-bit TIFF": lambda: saved(Image.fromarray(MASK.astype(np.uint16) * 257), "TIFF"),
    "float TIFF": lambda: saved(Image.fromarray(MASK.astype(np.float32) / 255), "TIFF"),
    "palette": lambda: saved(palette()),
    "opaque alpha": lambda: saved(Image.fromarray(MASK).convert("RGBA")),
    "transparent paint": lambda: saved(on_nothing("RGBA")),
    "grey and alpha": lambda: saved(on_nothing("LA")),
    "WebP": lambda: saved(Image.fromarray(MASK).convert("RGB"), "WEBP", lossless=True),
    "BMP": lambda: saved(Image.fromarray(MASK), "BMP"),
    "a profile": lambda: saved(Image.fromarray(MASK).convert("RGB"), icc_profile=_wide()),
}


def _wide() -> bytes:
    from PIL import ImageCms

    return ImageCms.ImageCmsProfile(ImageCms.createProfile("XYZ")).tobytes()


@pytest.mark.parametrize("kind", list(KINDS))
def test_every_kind_is_a_grey(kind: str) -> None:
    _, mask = with_mask(encoded(photo(112, 80)), KINDS[kind](), EXACT)
    assert np.abs(mask.astype(int) - MASK).max() <= 1, kind
    assert mask.shape == (80, 112)


def test_one_bit_and_jpeg() -> None:
    hard = MASK > 127
    _, mask = with_mask(encoded(photo(112, 80)), saved(Image.fromarray(hard)), EXACT)
    assert np.array_equal(mask, hard * np.uint8(255))
    _, mask = with_mask(encoded(photo(112, 80)), saved(Image.fromarray(MASK), "JPEG", quality=95), EXACT)
    assert np.abs(mask.astype(int) - MASK).mean() < 2


@pytest.mark.parametrize(
    ("data", "says"),
    [
        (b"no picture", "not an image"),
        (b"", "empty file"),
        (saved(Image.fromarray(MASK))[:-40], "truncated image"),
        (saved(Image.fromarray(MASK.astype(np.float32)), "TIFF"), "floats from 0 to 255, a mask has 0 to 1"),
        (saved(Image.fromarray(MASK), "JPEG")[:-300], "truncated image"),
    ],
)
def test_what_cant_be_read(data: bytes, says: str) -> None:
    with pytest.raises(BadImage, match=says):
        with_mask(encoded(photo(112, 80)), data, EXACT)


# ── the alpha channel ────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("kind", ["RGBA", "LA", "palette", "one color"])
def test_the_alpha_channel_is_the_mask(kind: str) -> None:
    """The picture itself is composited onto the background as without the option."""
    hard = Image.fromarray((MASK > 127) * np.uint8(255))
    if kind == "palette":
        image = Image.fromarray(np.where(MASK > 127, 7, 3).astype(np.uint8), "P")
        image.putpalette([value for value in range(256) for _ in range(3)])
        data = saved(image, transparency=3)
    elif kind == "one color":
        data = saved(hard.convert("RGB"), transparency=(0, 0, 0))
    else:
        image = Image.fromarray(photo(112, 80)).convert(kind[:-1])
        image.putalpha(hard)
        data = saved(image)
    plain = convert.store(data, EXACT)
    from dataclasses import replace

    found = convert.store(data, replace(EXACT, mask_from_alpha=True))
    assert plain.mask is None and found.mask is not None and found.data == plain.data
    assert np.array_equal(decode_mask(found.mask.data, 112, 80), np.asarray(hard))
    opaque = convert.store(encoded(photo(112, 80)), replace(EXACT, mask_from_alpha=True))
    assert opaque.mask is None, "an image without alpha has no mask"


# ── the latent grid ──────────────────────────────────────────────────────────────────────────────────────────────────


def test_the_mean_of_each_cell() -> None:
    grid = latent_mask(MASK)
    assert grid.shape == (10, 14) and grid.dtype == np.uint8
    for row in range(10):
        for column in range(14):
            cell = MASK[8 * row : 8 * row + 8, 8 * column : 8 * column + 8]
            assert grid[row, column] == int(np.floor(cell.mean(dtype=np.float64) + 0.5))
    assert mask_share(grid) == pytest.approx(grid.mean() / 255)
    assert mask_share(latent_mask(np.zeros((16, 16), np.uint8))) == 0
    assert latent_mask(np.full((16, 16), 255, np.uint8)).min() == 255
