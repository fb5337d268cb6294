"""HEIC and JPEG XL with their optional plugins (pip install '.[heic]', '.[jxl]'), and what is said without them."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from data_prep import make_shards
from data_prep.images import convert, formats
from data_prep.images.buckets import BucketOptions
from data_prep.images.header import ImageOptions
from data_prep.images.skip_reasons import FAILED, FILTERED, NO_READER, BadImage
from data_prep.shard_format.shards import read_manifest
from tests.helpers.photos import encoded, opened, photo

FIXED = ImageOptions(BucketOptions(fixed=(64, 48)), format="png", resize="pillow")


@pytest.fixture
def heic() -> None:
    pytest.importorskip("pillow_heif", reason="pillow-heif is not installed: pip install '.[heic]'")
    assert "heic" in formats.installed_plugins()


@pytest.fixture
def jxl() -> None:
    pytest.importorskip("pillow_jxl", reason="pillow-jxl-plugin is not installed: pip install '.[jxl]'")
    assert "jxl" in formats.installed_plugins()


def saved(pixels: np.ndarray, kind: str, **options: object) -> bytes:
    out = io.BytesIO()
    Image.fromarray(pixels).save(out, kind, **options)
    return out.getvalue()


def test_heic_upright_and_in_srgb(heic: None) -> None:
    pixels = photo(64, 48)
    pixels[:24, :32] = (220, 30, 40)
    found = opened(convert.store(saved(pixels, "HEIF", quality=95, chroma=444), FIXED).data).astype(int)
    assert np.abs(found - pixels).mean() < 4
    exif = Image.Exif()
    exif[0x0112] = 6
    # HEIF has a rotation of its own, which the decoder applies; the copy of it in EXIF must not turn the image again.
    stored = convert.store(saved(pixels, "HEIF", quality=95, chroma=444, exif=exif), FIXED)
    assert np.abs(opened(stored.data).astype(int) - pixels).mean() < 4


def test_heic_with_transparency(heic: None) -> None:
    pixels = np.zeros((48, 64, 4), np.uint8)
    pixels[:, :32] = (200, 10, 10, 255)
    found = opened(convert.store(saved(pixels, "HEIF", quality=95), FIXED).data)
    assert (
        np.abs(found[20, 50].astype(int) - 255).max() <= 3
        and np.abs(found[20, 10].astype(int) - [200, 10, 10]).max() < 12
    )


@pytest.mark.parametrize("kind", ["HEIF", "JXL"])
def test_damage_is_a_failed_input(request: pytest.FixtureRequest, kind: str) -> None:
    request.getfixturevalue("heic" if kind == "HEIF" else "jxl")
    data = saved(photo(64, 48), kind)
    rng = np.random.default_rng(0)
    for cut in (20, len(data) // 2, len(data) - 4):
        with pytest.raises(BadImage) as caught:
            convert.store(data[:cut], FIXED)
        assert caught.value.status == FAILED
    for _ in range(40):
        damaged = bytearray(data)
        for place in rng.integers(0, len(data), 6):
            damaged[place] = rng.integers(256)
        try:
            convert.store(bytes(damaged), FIXED)
        except BadImage as error:
            assert error.reason


def test_jpeg_xl(jxl: None) -> None:
    pixels = photo(64, 48)
    found = opened(convert.store(saved(pixels, "JXL", lossless=True), FIXED).data)
    assert np.array_equal(found, pixels)


def test_a_folder_of_heic(heic: None, tmp_path: Path) -> None:
    base = tmp_path / "in"
    base.mkdir()
    for number in range(3):
        (base / f"IMG_{number}.HEIC").write_bytes(saved(photo(90, 70, seed=number), "HEIF"))
        (base / f"IMG_{number}.txt").write_text("a phone's photo")
    flags = ["--dataset_base_path", str(base), "--output_path", str(tmp_path / "out"), "--resize", "pillow"]
    assert make_shards.main([*flags, "--num_workers", "1", "--max_pixels", "4096"]) == 0
    manifest = read_manifest(tmp_path / "out")
    assert manifest.totals["samples"] == 3 and "heic" in manifest.options["image_plugins"]
    assert "pillow-heif" in manifest.versions


# ── without ──────────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.fixture
def without(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(formats, "installed_plugins", lambda: ())
    monkeypatch.setattr(formats, "read_formats", lambda: formats.BUILT_IN)


@pytest.mark.parametrize(
    "start", [b"\0\0\0\x24ftypheic", b"\0\0\0\x18ftypmif1", b"\xff\x0a", b"\0\0\0\x0cJXL \r\n\x87\n"]
)
def test_content_that_a_plugin_would_read(without: None, start: bytes) -> None:
    with pytest.raises(BadImage) as caught:
        convert.store(start + bytes(300), FIXED)
    assert (caught.value.status, caught.value.reason) == (FILTERED, NO_READER) and "pip install" in caught.value.detail


def test_run_and_dry_run_say_the_same(without: None, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    base = tmp_path / "in"
    base.mkdir()
    (base / "ok.jpg").write_bytes(encoded(photo(90, 70)))
    for number in range(43):
        (base / f"IMG_{number:02d}.heic").write_bytes(b"\0\0\0\x24ftypheic" + bytes(300))
    for path in list(base.iterdir()):
        path.with_suffix(".txt").write_text("x")
    flags = ["--dataset_base_path", str(base), "--output_path", str(tmp_path / "out"), "--num_workers", "0"]
    flags += ["--resize", "pillow", "--max_pixels", "4096"]
    line = "43  filtered: no reader for this format; first IMG_00.heic (.heic: pip install '.[heic]' reads it)"
    for extra in (["--dry_run"], []):
        assert make_shards.main([*flags, *extra]) == 0
        assert line in capsys.readouterr().out
    totals = read_manifest(tmp_path / "out").totals
    assert (totals["inputs"], totals["filtered"], totals["failed"]) == (44, 43, 0)
    (base / "ok.jpg").unlink()
    assert make_shards.main([*flags, "--dry_run"]) == 2
    assert "none of 43 images can be used: 43 filtered: no reader" in capsys.readouterr().err
