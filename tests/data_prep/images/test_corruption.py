"""Damaged files: refused where their format can tell, and never an exception that leaves."""

from __future__ import annotations

import ast
import io
import random
import re
import struct
import time
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from data_prep import make_shards
from data_prep.images import convert
from data_prep.images.buckets import BucketOptions
from data_prep.images.header import ImageOptions, read_header
from data_prep.images.skip_reasons import CORRUPT, FAILED, TRUNCATED, BadImage
from data_prep.images.stored_pixels import decode_stored
from tests.helpers.photos import encoded, opened, photo
from tests.helpers.raw_images import tiff

FIXED = BucketOptions(fixed=(64, 48))
STRICT = ImageOptions(FIXED, format="png", resize="pillow")
KEEP = ImageOptions(FIXED, format="png", resize="pillow", on_corrupt="keep")
JPG = ImageOptions(FIXED, resize="pillow")
ENDINGS = {
    "JPEG": "jpg",
    "PNG": "png",
    "WEBP": "webp",
    "GIF": "gif",
    "TIFF": "tif",
    "BMP": "bmp",
    "AVIF": "avif",
    "MPO": "jpg",
}


def failure(data: bytes, options: ImageOptions = STRICT) -> tuple[str, str]:
    with pytest.raises(BadImage) as caught:
        convert.store(data, options)
    return caught.value.status, caught.value.reason


@pytest.mark.parametrize("progressive", [False, True])
def test_damaged_jpegs_fail_and_are_kept_when_told(progressive: bool) -> None:
    data = encoded(photo(400, 300), progressive=progressive)
    middle = len(data) // 2
    damages = {
        "zeros": data[:middle] + bytes(4096) + data[middle + 4096 :],
        "cut with an end mark": data[:middle] + b"\xff\xd9",
        "cut": data[:middle],
    }
    for name, damaged in damages.items():
        assert failure(damaged)[0] == FAILED, name
        assert failure(damaged)[1] in (CORRUPT, TRUNCATED), name
    kept = convert.store(damages["zeros"], KEEP)
    assert not kept.copied and "kept" in kept.warnings[0]


def test_a_progressive_jpeg_without_its_last_scans() -> None:
    data = encoded(photo(400, 300), progressive=True)
    scans = [found.start() for found in re.finditer(rb"\xff\xda", data)]
    assert len(scans) > 5
    for scan in scans[1:]:
        assert failure(data[:scan] + b"\xff\xd9") == (FAILED, TRUNCATED)
    convert.store(data, STRICT)


def test_what_only_looks_odd_is_fine() -> None:
    data = encoded(photo(64, 48))
    place = data.index(b"JFIF") + 5
    for name, odd in {
        "behind the end": data + b"\0" * 500,
        "unknown JFIF version": data[:place] + b"\x09\x09" + data[place + 2 :],
        "fill bytes before the end mark": data[:-2] + b"\xff" * 3 + data[-2:],
    }.items():
        assert np.abs(opened(convert.store(odd, STRICT).data).astype(int) - opened(data)).max() <= 2, name


def test_files_of_bucket_size_are_decoded_before_they_are_copied() -> None:
    data = encoded(photo(64, 48))
    assert convert.store(data, JPG).copied
    middle = len(data) // 2
    assert failure(data[:middle] + bytes(64) + data[middle + 64 :], JPG) == (FAILED, CORRUPT)
    kept = convert.store(
        data[:middle] + bytes(64) + data[middle + 64 :], ImageOptions(FIXED, resize="pillow", on_corrupt="keep")
    )
    assert not kept.copied  # what is stored is whole, whatever it shows
    decode_stored(kept.data, 64, 48)


def test_what_is_stored_is_read_as_strictly() -> None:
    data = encoded(photo(64, 48))
    middle = len(data) // 2
    with pytest.raises(ValueError, match=CORRUPT):
        decode_stored(data[:middle] + bytes(64) + data[middle + 64 :], 64, 48)
    png = bytearray(encoded(photo(64, 48), "PNG"))
    png[len(png) // 2] ^= 1
    with pytest.raises(ValueError, match=CORRUPT):
        decode_stored(bytes(png), 64, 48)


def test_cmyk_is_checked_though_pillow_decodes_it() -> None:
    out = io.BytesIO()
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (48, 64, 4), dtype=np.uint8), "CMYK").save(out, "JPEG")
    data = out.getvalue()
    convert.store(data, STRICT)
    assert failure(data[: len(data) // 2] + bytes(200) + data[len(data) // 2 + 200 :]) == (FAILED, CORRUPT)


@pytest.mark.parametrize("kind", ["PNG", "TIFF"])
def test_checksums_find_one_flipped_bit(kind: str) -> None:
    pixels = photo(64, 48).astype(int)
    data = encoded(photo(64, 48), "PNG") if kind == "PNG" else tiff(pixels, 8, 2, big=False, deflate=True)
    convert.store(data, STRICT)
    start = data.index(b"IDAT") + 20 if kind == "PNG" else len(data) // 2
    missed = 0
    for place in range(start, start + 400, 20):
        damaged = bytearray(data)
        damaged[place] ^= 4
        missed += failure(bytes(damaged))[0] != FAILED
    assert not missed


@pytest.mark.parametrize("kind", ["WEBP", "AVIF", "PNG", "GIF", "BMP", "TIFF"])
def test_cut_files_fail(kind: str) -> None:
    data = encoded(photo(64, 48), kind)
    for cut in (len(data) - 5, len(data) * 3 // 4, len(data) // 2):
        if not (kind == "GIF" and cut == len(data) - 5):  # all pixels are there
            assert failure(data[:cut])[0] == FAILED, cut


def test_postscript_under_another_name_reaches_no_interpreter(monkeypatch: pytest.MonkeyPatch) -> None:
    from PIL import EpsImagePlugin

    monkeypatch.setattr(EpsImagePlugin, "Ghostscript", lambda *_, **__: pytest.fail("Ghostscript was asked"))
    eps = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 64 48\n%%EndComments\nshowpage\n"
    assert failure(eps) == (FAILED, "not an image")
    with pytest.raises(ValueError, match="cannot identify"):
        decode_stored(eps, 64, 48)


def animation() -> bytes:
    frames = [Image.fromarray(photo(96, 64, seed=number)) for number in range(5)]
    out = io.BytesIO()
    frames[0].save(out, "GIF", save_all=True, append_images=frames[1:])
    return out.getvalue()


def test_cut_animations_and_pages_are_one_failed_input(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    base = tmp_path / "in"
    base.mkdir()
    data, kinds = animation(), set()
    for cut in range(len(data) - 1, 200, -41):
        try:
            Image.open(io.BytesIO(data[:cut])).n_frames  # noqa: B018
        except Exception as error:
            if type(error).__name__ not in kinds:
                kinds.add(type(error).__name__)
                (base / f"{type(error).__name__}.gif").write_bytes(data[:cut])
                (base / f"{type(error).__name__}.txt").write_text("an animation")
    out = io.BytesIO()
    pages = [Image.fromarray(photo(96, 64, seed=number)) for number in range(3)]
    pages[0].save(out, "TIFF", save_all=True, append_images=pages[1:])
    pages_data = bytearray(out.getvalue())
    second = struct.unpack_from("<I", pages_data, 4 + 0)[0]
    count = struct.unpack_from("<H", pages_data, second)[0]
    struct.pack_into("<I", pages_data, second + 2 + 12 * count, len(pages_data) - 3)  # the next page lies at the end
    (base / "pages.tif").write_bytes(pages_data)
    (base / "pages.txt").write_text("pages")
    for number in range(4):
        (base / f"good{number}.jpg").write_bytes(encoded(photo(96, 64, seed=number)))
        (base / f"good{number}.txt").write_text("a good one")
    assert kinds
    flags = ["--dataset_base_path", str(base), "--num_workers", "0", "--resize", "pillow", "--max_pixels", "4096"]
    for extra in (["--dry_run"], []):
        assert make_shards.main([*flags, "--output_path", str(tmp_path / "out"), *extra]) == 0
        printed = capsys.readouterr().out
        assert all(f"{name}.gif" in printed for name in kinds) and "pages.tif" in printed


# ── fuzz ─────────────────────────────────────────────────────────────────────────────────────────────────────────────


def fuzzed(rng: random.Random, data: bytes) -> bytes:
    """A cut, some flipped bytes, a stretch of zeros, or a piece taken out."""
    kind, place = rng.randrange(4), rng.randrange(len(data))
    if kind == 0:
        return data[:place]
    if kind == 1:
        damaged = bytearray(data)
        for _ in range(rng.randrange(1, 9)):
            damaged[rng.randrange(min(len(data), rng.choice([40, 400, len(data)])))] = rng.randrange(256)
        return bytes(damaged)
    size = rng.randrange(1, 600)
    return data[:place] + (bytes(min(size, len(data) - place)) if kind == 2 else b"") + data[place + size :]


def originals() -> dict[str, bytes]:
    small = photo(80, 60)
    files = {kind: encoded(small, kind) for kind in ("JPEG", "PNG", "WEBP", "GIF", "TIFF", "BMP", "AVIF")}
    files |= {"animated GIF": animation(), "progressive": encoded(small, progressive=True)}
    for compression in ("tiff_lzw", "tiff_adobe_deflate", "jpeg", "packbits"):
        files[f"TIFF {compression}"] = encoded(small, "TIFF", compression=compression)
    for mode in ("L", "P", "CMYK", "1", "RGBA", "LA"):
        for kind in ("JPEG", "PNG", "TIFF", "WEBP"):
            out = io.BytesIO()
            try:
                Image.fromarray(small).convert(mode).save(out, kind)
            except OSError:
                continue
            files[f"{kind} {mode}"] = out.getvalue()
    return files


def test_no_damage_lets_an_exception_out() -> None:
    """Cuts and flips of small files of every format, for at most 12 seconds: each is stored or is a BadImage."""
    rng, files, until = random.Random(19), originals(), time.monotonic() + 12
    tried, packed = 0, 0
    while tried < 4000 and time.monotonic() < until:
        name = list(files)[tried % len(files)]
        data = fuzzed(rng, files[name])
        tried += 1
        for options in (STRICT, KEEP):
            try:
                read_header(io.BytesIO(data), options)
                convert.store(data, options)
                packed += options is STRICT
            except BadImage as error:
                assert error.status in ("failed", "filtered") and error.reason and "\n" not in str(error), name
    assert tried > 300 and packed < tried, f"{packed} of {tried} packed"


def test_every_fuzzed_file_has_its_row(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """Through the command: as many rows as files, each ok or with a reason, and nothing anonymous on the error stream."""
    import pyarrow.parquet as pq

    base, rng = tmp_path / "in", random.Random(20)
    base.mkdir()
    for number, (name, data) in enumerate([*originals().items()] * 3):
        ending = ENDINGS.get(name.split()[-1], ENDINGS.get(name.split()[0], "jpg"))
        (base / f"{number:03d}.{ending}").write_bytes(data if number % 3 == 0 else fuzzed(rng, data))
        (base / f"{number:03d}.txt").write_text(name)
    flags = ["--dataset_base_path", str(base), "--output_path", str(tmp_path / "out"), "--max_failed_ratio", "1"]
    assert make_shards.main([*flags, "--num_workers", "0", "--resize", "pillow", "--max_pixels", "4096"]) == 0
    rows = pq.read_table(tmp_path / "out" / "000000.parquet").to_pylist()
    assert len(rows) == len(list(base.glob("*.txt")))
    assert all(row["status"] == "ok" or (row["status"] in ("failed", "filtered") and row["reason"]) for row in rows)
    noise = [line for line in capfd.readouterr().err.replace("\r", "\n").splitlines() if line and "img" not in line]
    assert not noise


def test_every_image_is_opened_with_an_explicit_list_of_formats() -> None:
    """Everywhere in the project: Pillow alone opens whatever it has a plugin for."""
    root = Path(__file__).parents[3]
    folders = ("data_prep", "train", "demo", "bench", "qwen_image", "files")
    calls = [
        (file, node)
        for folder in folders
        for file in (root / folder).rglob("*.py")
        for node in ast.walk(ast.parse(file.read_text()))
        if isinstance(node, ast.Call) and ast.unparse(node.func) == "Image.open"
    ]
    assert len(calls) > 5
    assert not [str(file) for file, node in calls if "formats" not in [keyword.arg for keyword in node.keywords]]
