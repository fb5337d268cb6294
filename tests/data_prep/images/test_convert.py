"""One image: turning, color, resize, copy, and each way to fail with its reason."""

from __future__ import annotations

import io
import struct
import zlib
from fractions import Fraction

import numpy as np
import pytest
from PIL import Image, ImageCms, ImageOps

from data_prep.images import convert as images
from data_prep.images import header as headers
from data_prep.images import resizing
from data_prep.images.buckets import BucketOptions
from data_prep.images.header import ImageOptions
from data_prep.images.skip_reasons import BadImage
from tests.helpers.photos import encoded, opened, photo, psnr

FIXED = ImageOptions(buckets=BucketOptions(fixed=(64, 48)), format="png", resize="pillow")


def stored(data: bytes, options: ImageOptions = FIXED) -> np.ndarray:
    return opened(images.store(data, options).data)


def reason(data: bytes, options: ImageOptions = FIXED) -> tuple[str, str, str]:
    with pytest.raises(BadImage) as caught:
        images.store(data, options)
    return caught.value.status, caught.value.reason, caught.value.detail


# ── turning ──────────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "TIFF"])
def test_exif_orientation_is_applied_and_dropped(orientation: int, kind: str) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    pixels = photo(120, 90, seed=3)
    options = {"lossless": True} if kind == "WEBP" else {}
    data = encoded(pixels, kind, exif=exif, **options)
    upright = ImageOps.exif_transpose(Image.open(io.BytesIO(data))).convert("RGB")
    size = (64, 48) if orientation < 5 else (48, 64)
    result = images.store(data, ImageOptions(BucketOptions(fixed=size), format="png", resize="pillow"))
    assert (result.original_width, result.original_height) == upright.size
    expected = np.asarray(upright.resize(size, Image.Resampling.LANCZOS, box=_box(result)))
    found = Image.open(io.BytesIO(result.data))
    assert psnr(np.asarray(found), expected) > 45
    assert 0x0112 not in found.getexif()


def _box(result: images.Stored) -> tuple[int, int, int, int]:
    place = result.placement
    left, top = place.crop_left, place.crop_top
    return left, top, left + place.crop_width, top + place.crop_height


def test_orientation_decides_before_the_filters() -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    data = encoded(photo(90, 60), exif=exif)
    header = headers.read_header(io.BytesIO(data), FIXED)
    assert (header.width, header.height) == (60, 90)
    assert reason(data)[1] == "too small"  # 60 pixels wide once upright


def test_exif_behind_the_pixels_of_a_png() -> None:
    data = encoded(photo(120, 90), "PNG")
    tiff = b"MM\0*\0\0\0\x08\0\x01\x01\x12\0\x03\0\0\0\x01\0\x06\0\0\0\0\0\0"
    chunk = b"eXIf" + tiff
    chunk = struct.pack(">I", len(tiff)) + chunk + struct.pack(">I", zlib.crc32(chunk))
    cut = data.rindex(b"IEND") - 4
    result = images.store(data[:cut] + chunk + data[cut:], ImageOptions(BucketOptions((64 * 64,)), resize="pillow"))
    assert (result.original_width, result.original_height) == (90, 120)


# ── color ────────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_grey_of_16_bits_is_scaled() -> None:
    ramp = np.linspace(0, 65535, 64 * 48).reshape(48, 64).astype(np.uint16)
    out = io.BytesIO()
    Image.fromarray(ramp).save(out, "PNG")
    found = stored(out.getvalue())
    assert np.array_equal(found[..., 0], np.round(ramp / 257).astype(np.uint8))
    assert np.array_equal(found[..., 0], found[..., 2])


def test_transparency_shows_the_background() -> None:
    pixels = np.zeros((48, 64, 4), np.uint8)
    pixels[:, :32] = [200, 10, 10, 255]
    pixels[:, 32:] = [0, 0, 0, 0]
    out = io.BytesIO()
    Image.fromarray(pixels).save(out, "PNG")
    found = stored(out.getvalue())
    assert (found[0, 0] == [200, 10, 10]).all() and (found[0, 63] == 255).all()
    blue = ImageOptions(FIXED.buckets, format="png", background=(0, 0, 255), resize="pillow")
    assert (stored(out.getvalue(), blue)[0, 63] == [0, 0, 255]).all()


def test_transparent_palette_entry() -> None:
    image = Image.new("P", (64, 48), 0)
    image.putpalette([255, 0, 0, 0, 255, 0])
    image.paste(1, (32, 0, 64, 48))
    for kind in ("PNG", "GIF"):
        out = io.BytesIO()
        image.save(out, kind, transparency=1)
        found = stored(out.getvalue())
        assert (found[0, 0] == [255, 0, 0]).all() and (found[0, 63] == 255).all(), kind


def test_cmyk_and_grey_become_rgb() -> None:
    out = io.BytesIO()
    Image.new("CMYK", (64, 48), (0, 255, 255, 0)).save(out, "JPEG", quality=95)
    assert np.abs(stored(out.getvalue()).astype(int) - [255, 0, 0]).max() <= 3
    out = io.BytesIO()
    Image.new("L", (64, 48), 77).save(out, "JPEG", quality=95)
    assert np.abs(stored(out.getvalue()).astype(int) - 77).max() <= 1


def _wide_profile() -> bytes:
    """An RGB profile that isn't sRGB: sRGB's, with the red and green primaries exchanged."""
    data = bytearray(ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes())
    red, green = data.index(b"rXYZ", 128), data.index(b"gXYZ", 128)
    data[red : red + 4], data[green : green + 4] = b"gXYZ", b"rXYZ"
    return bytes(data)


@pytest.mark.parametrize("kind", ["JPEG", "PNG"])
def test_profiles_are_applied_and_dropped(kind: str) -> None:
    pixels = np.zeros((48, 64, 3), np.uint8)
    pixels[:] = [220, 30, 60]
    result = images.store(encoded(pixels, kind, icc_profile=_wide_profile()), FIXED)
    assert np.abs(opened(result.data)[20, 20].astype(int) - [30, 220, 60]).max() <= 4
    assert "icc_profile" not in Image.open(io.BytesIO(result.data)).info


def test_srgb_and_broken_profiles_change_nothing() -> None:
    pixels = photo(64, 48)
    srgb = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    for profile in (srgb, b"not a profile"):
        assert np.array_equal(stored(encoded(pixels, "PNG", icc_profile=profile)), pixels)


# ── resizing and copying ─────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("size", [(200, 150), (333, 301), (64, 48)])
def test_torch_and_pillow_give_the_same_picture(size: tuple[int, int]) -> None:
    if resizing.resize_backend() == "pillow":
        pytest.skip("this torch cannot resize uint8 with Lanczos; Pillow does it")
    data = encoded(photo(*size), "PNG")
    fast = ImageOptions(FIXED.buckets, format="png", resize="torch")
    assert psnr(stored(data), stored(data, fast)) > 60


def test_matching_jpegs_are_copied() -> None:
    data = encoded(photo(64, 48))
    jpg = ImageOptions(BucketOptions(fixed=(64, 48)), resize="pillow")
    result = images.store(data, jpg)
    assert result.copied and result.data == data
    exif = Image.Exif()
    exif[0x0112] = 3
    grey = encoded(photo(64, 48)[..., 0])
    for other in (encoded(photo(64, 48), exif=exif), encoded(photo(64, 48), icc_profile=_wide_profile()), grey):
        assert not images.store(other, jpg).copied
    assert not images.store(data + b"behind the end mark", jpg).copied
    assert reason(data[:-300], jpg)[1] == "truncated image"


def test_quality_and_subsampling() -> None:
    pixels = photo(400, 300)
    options = ImageOptions(BucketOptions((256 * 256,)), resize="pillow")
    data = images.store(encoded(pixels), options).data
    image = Image.open(io.BytesIO(data))
    assert image.size == (288, 224) and [layer[1:3] for layer in image.layer] == [(1, 1)] * 3  # 4:4:4
    assert len(images.store(encoded(pixels), ImageOptions(options.buckets, quality=50, resize="pillow")).data) < len(
        data
    )


# ── bad images ───────────────────────────────────────────────────────────────────────────────────────────────────────


def test_reasons_of_broken_files() -> None:
    whole = {kind: encoded(photo(400, 300), kind) for kind in ("JPEG", "PNG", "WEBP")}
    assert reason(b"") == ("failed", "empty file", "")
    assert reason(b"<!DOCTYPE html><html>404</html>")[1:] == ("not an image", "starts with b'<!DOCTYPE html><html>404'")
    for kind, data in whole.items():
        found = reason(data[: len(data) // 2])
        assert found[0] == "failed" and found[1] in ("truncated image", "cannot decode", "not an image"), (kind, found)
    assert reason(whole["JPEG"][: len(whole["JPEG"]) // 2])[1] == "truncated image"
    assert reason(whole["PNG"][: len(whole["PNG"]) // 2])[1] == "truncated image"


def test_bomb_is_refused_from_its_header() -> None:
    row = zlib.compress(bytes(20_000 * 3 + 1))
    head = struct.pack(">IIBBBBB", 20_000, 20_000, 8, 2, 0, 0, 0)

    def chunk(name: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))

    bomb = b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", row * 50) + chunk(b"IEND", b"")
    assert reason(bomb) == ("failed", "too many pixels", "20000x20000 is 400.0 MP, limit 200 MP")


def test_filters() -> None:
    assert reason(encoded(photo(60, 60)))[:2] == ("filtered", "too small")
    wide = ImageOptions(BucketOptions(max_aspect_ratio=Fraction(2)))
    assert reason(encoded(photo(600, 100)), wide) == ("filtered", "extreme aspect ratio", "600x100 is beyond 2:1")
    large = ImageOptions(min_pixels=10_000)
    assert reason(encoded(photo(90, 90)), large)[:2] == ("filtered", "too few pixels")


@pytest.mark.parametrize("kind", ["GIF", "WEBP", "PNG"])
def test_animations(kind: str) -> None:
    frames = [Image.new("RGB", (64, 48), color) for color in ("red", "lime", "blue")]
    out = io.BytesIO()
    frames[0].save(out, kind, save_all=True, append_images=frames[1:], **({"lossless": True} if kind == "WEBP" else {}))
    result = images.store(out.getvalue(), FIXED)
    assert result.frames == 3 and (opened(result.data) == [255, 0, 0]).all()
    rejecting = ImageOptions(FIXED.buckets, format="png", on_animation="reject", resize="pillow")
    assert reason(out.getvalue(), rejecting) == ("filtered", "animated", "3 frames")


def test_floating_point_pixels() -> None:
    out = io.BytesIO()
    Image.fromarray(np.ones((48, 64), np.float32)).save(out, "TIFF")
    assert reason(out.getvalue())[1] == "cannot decode" and "unsupported pixels" in reason(out.getvalue())[2]


def test_random_bytes_never_raise_anything_else() -> None:
    rng = np.random.default_rng(0)
    whole = [encoded(photo(100, 80), kind) for kind in ("JPEG", "PNG", "WEBP", "GIF", "TIFF", "BMP")]
    for data in whole:
        for _ in range(25):
            damaged = bytearray(data)
            for position in rng.integers(0, len(data), 8):
                damaged[position] = rng.integers(256)
            try:
                images.store(bytes(damaged), FIXED)
            except BadImage as error:
                assert error.reason and "\n" not in error.detail


@pytest.mark.parametrize(("field", "value"), [("quality", 0), ("quality", 101), ("min_pixels", -1)])
def test_options_are_checked(field: str, value: int) -> None:
    with pytest.raises(ValueError, match=f"--{field} {value}: must be from"):
        ImageOptions(**{field: value})
