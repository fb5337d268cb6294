"""Files of source images: what sample.py makes of one is what the packer makes of it."""

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from qwen_image.encoders.source_images import read_source, size_as_source
from tests.helpers.raw_images import icc

AREA, SIDE = 64 * 64, 64
ORIENTATION = 0x0112


def patches(channels: int, top: int = 255) -> np.ndarray:
    values = np.random.default_rng(0).integers(0, top + 1, (SIDE // 8, SIDE // 8, channels))
    return values.repeat(8, axis=0).repeat(8, axis=1)


def srgb(light: np.ndarray) -> np.ndarray:
    return np.where(light <= 0.0031308, 12.92 * light, 1.055 * light ** (1 / 2.4) - 0.055) * 255


@pytest.mark.parametrize("mode", ["RGB", "RGBA", "L"])
def test_a_color_profile_is_applied_and_alpha_lies_on_white(tmp_path: Path, mode: str):
    """Gamma 1.3 to sRGB's curve; the reference is written out here."""
    values = patches(len(mode)).astype(np.uint8)
    picture = Image.fromarray(values if len(mode) > 1 else values[..., 0])
    assert picture.mode == mode
    picture.save(tmp_path / "a.png", icc_profile=icc("GRAY" if mode == "L" else "RGB", 1.3))
    colors = np.broadcast_to(srgb((values[..., :3] / 255) ** 1.3), (SIDE, SIDE, 3))
    alpha = values[..., 3:] / 255 if mode == "RGBA" else 1.0
    found = read_source(tmp_path / "a.png", AREA)
    assert np.abs(found.pixels - (colors * alpha + 255 * (1 - alpha))).max() < 2.5
    assert np.abs(values[..., :3] * alpha + 255 * (1 - alpha) - found.pixels).max() > 10, (
        "without the profile it differs"
    )


def test_sixteen_bits_are_scaled_and_not_cut(tmp_path: Path):
    values = patches(1, 65535)[..., 0].astype(np.uint16)
    Image.fromarray(values).save(tmp_path / "a.png")
    assert np.abs(read_source(tmp_path / "a.png", AREA).pixels - values[..., None] / 257).max() <= 1


def test_a_damaged_profile_is_passed_over(tmp_path: Path):
    values = patches(3).astype(np.uint8)
    Image.fromarray(values).save(tmp_path / "a.png", icc_profile=b"no profile at all")
    assert np.array_equal(read_source(tmp_path / "a.png", AREA).pixels, values)


def test_a_picture_on_its_side_is_turned_and_its_size_is_known_from_the_header(tmp_path: Path):
    exif = Image.Exif()
    exif[ORIENTATION] = 6
    Image.new("RGB", (128, 64), "red").save(tmp_path / "a.jpg", exif=exif)
    found = read_source(tmp_path / "a.jpg", 32 * 64)
    assert found.pixels.shape == (64, 32, 3) and (found.width, found.height) == (64, 128)
    assert size_as_source(tmp_path / "a.jpg", 32 * 64) == (32, 64)
