"""The packer as users call it: what comes out, every bad input's row, identical bytes, restarts, errors."""

from __future__ import annotations

import errno
import hashlib
import json
import random
import signal
import struct
import subprocess
import sys
import tarfile
import time
import zlib
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
from PIL import Image

from data_prep import make_shards
from data_prep.shard_format import shards
from data_prep.shard_format.shards import ShardReader, read_index, read_manifest
from tests.helpers.photos import encoded, opened, photo

ROOT = Path(__file__).parents[2]
SMALL = ["--max_pixels", "4096", "--num_workers", "0", "--resize", "pillow"]


def photos_in(folder: Path, count: int, seed: int = 0) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(seed)
    for number in range(count):
        width, height = (int(side) for side in rng.integers(70, 140, 2))
        (folder / f"{number:03d}.jpg").write_bytes(encoded(photo(width, height, seed=number)))
        (folder / f"{number:03d}.txt").write_text(f"photo number {number}")
    return folder


def pack(base: Path, out: Path, *flags: str) -> int:
    return make_shards.main(["--dataset_base_path", str(base), "--output_path", str(out), *SMALL, *flags])


def hashes(folder: Path) -> dict[str, str]:
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def rows_of(out: Path) -> dict[str, dict]:
    return {row["path"]: row for path in sorted(out.glob("*.parquet")) if path.name != shards.INDEX for row in
            pq.read_table(path).to_pylist()}  # fmt: skip


# ── what comes out ───────────────────────────────────────────────────────────────────────────────────────────────────


def test_a_clean_folder(tmp_path: Path) -> None:
    base, out = photos_in(tmp_path / "in", 12), tmp_path / "out"
    assert pack(base, out, "--samples_per_shard", "5") == 0
    manifest, index = read_manifest(out), read_index(out)
    assert [(shard.name, shard.samples) for shard in manifest.shards] == [
        ("000000.tar", 5),
        ("000001.tar", 5),
        ("000002.tar", 2),
    ]
    assert json.loads((out / "sizes.json").read_text()) == {"000000.tar": 5, "000001.tar": 5, "000002.tar": 2}
    assert manifest.payload == "jpg" and manifest.totals["samples"] == manifest.totals["inputs"] == len(index) == 12
    assert sum(bucket.count for bucket in manifest.buckets) == 12
    reader = ShardReader(out)
    for row in range(12):
        record = json.loads(reader.read(index.shard[row], index.json_offset[row], index.json_size[row]))
        text = reader.read(index.shard[row], index.txt_offset[row], index.txt_size[row]).decode()
        pixels = opened(reader.read(index.shard[row], index.payload_offset[row], index.payload_size[row]))
        bucket = manifest.buckets[index.bucket[row]]
        assert record["key"] == index.key[row] and record["path"] == index.path[row] == f"{row:03d}.jpg"
        assert text == record["caption"] == f"photo number {row}" and index.caption_length[row] == len(text)
        assert pixels.shape == (bucket.height, bucket.width, 3) == (record["height"], record["width"], 3)
        assert record["bucket"] == f"{bucket.width}x{bucket.height}"
        assert record["sha256"] == hashlib.sha256((base / f"{row:03d}.jpg").read_bytes()).hexdigest()
    for shard in manifest.shards:
        path = out / shard.name
        assert hashlib.sha256(path.read_bytes()).hexdigest() == shard.sha256 and path.stat().st_size == shard.bytes
        with tarfile.open(path) as tar:
            members = tar.getmembers()
        assert [member.name.partition(".")[2] for member in members] == ["jpg", "json", "txt"] * shard.samples
        assert all((member.mtime, member.uid, member.gid, member.mode) == (0, 0, 0, 0o644) for member in members)


def test_png_and_fixed_size(tmp_path: Path) -> None:
    base, out = photos_in(tmp_path / "in", 2), tmp_path / "out"
    flags = ["--dataset_base_path", str(base), "--output_path", str(out), "--num_workers", "0", "--resize", "pillow"]
    assert make_shards.main([*flags, "--height", "64", "--width", "48", "--image_format", "png"]) == 0
    manifest = read_manifest(out)
    assert manifest.payload == "png"
    assert [(bucket.width, bucket.height, bucket.count) for bucket in manifest.buckets] == [(48, 64, 2)]


def test_packing_the_output_again_copies_every_byte(tmp_path: Path) -> None:
    base, out, again = photos_in(tmp_path / "in", 4), tmp_path / "out", tmp_path / "again"
    assert pack(base, out) == 0 and pack(out, again) == 0
    assert read_manifest(again).totals["copied"] == 4
    first, second = (opened_payloads(folder) for folder in (out, again))
    assert first == second


def opened_payloads(folder: Path) -> list[bytes]:
    index, reader = read_index(folder), ShardReader(folder)
    return [
        reader.read(index.shard[row], index.payload_offset[row], index.payload_size[row]) for row in range(len(index))
    ]


# ── bad inputs ───────────────────────────────────────────────────────────────────────────────────────────────────────


def bomb() -> bytes:
    def chunk(name: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))

    head = struct.pack(">IIBBBBB", 20_000, 20_000, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", zlib.compress(bytes(10**6)))


def test_every_bad_input_gets_its_row(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    base, out = photos_in(tmp_path / "in", 12), tmp_path / "out"
    good = encoded(photo(100, 100))
    animation = [Image.new("RGB", (100, 100), color) for color in ("red", "blue")]
    files = {
        "empty.jpg": b"",
        "page.jpg": b"<html>not found</html>",
        "cut.jpg": good[: len(good) // 2],
        "bomb.png": bomb(),
        "tiny.png": encoded(photo(10, 10), "PNG"),
        "long.png": encoded(photo(500, 70), "PNG"),
        "latin.jpg": good,
        "silent.jpg": good,
        "blank.jpg": good,
        "photo v1.2.jpg": good,
        "Käfer mit Raum.JPG": good,
        "twin.jpg": good,
        "twin.png": encoded(photo(100, 100), "PNG"),
    }
    for name, data in files.items():
        (base / name).write_bytes(data)
        (base / name).with_suffix(".txt").write_text("caption of " + name)
    animation[0].save(base / "moving.gif", save_all=True, append_images=animation[1:])
    (base / "moving.txt").write_bytes("bewegt\r\n".encode("utf-16"))
    (base / "latin.txt").write_bytes(b"caf\xe9")
    (base / "silent.txt").unlink()
    (base / "blank.txt").write_text(" \n")
    assert pack(base, out) == 0
    rows = rows_of(out)
    assert len(rows) == 12 + len(files) + 1  # one row an input
    found = {path: (row["status"], row["reason"], row["detail"]) for path, row in rows.items() if row["status"] != "ok"}
    assert found.pop("cut.jpg")[:2] == ("failed", "truncated image")
    assert found == {
        "empty.jpg": ("failed", "empty file", ""),
        "page.jpg": ("failed", "not an image", "starts with b'<html>not found</html>'"),
        "bomb.png": ("failed", "too many pixels", "20000x20000 is 400.0 MP, limit 200 MP"),
        "tiny.png": ("filtered", "too small", "10x10 fills the smallest bucket only beyond --max_upscale 1"),
        "long.png": ("filtered", "extreme aspect ratio", "500x70 is beyond 4:1"),
        "latin.jpg": ("failed", "caption not readable", "latin.txt: not utf-8 at byte 3: save it as UTF-8"),
        "silent.jpg": ("filtered", "no caption", "missing: looked for silent.txt and silent.caption"),
        "blank.jpg": ("filtered", "no caption", "empty"),
    }
    assert rows["moving.gif"]["caption"] == "bewegt" and rows["moving.gif"]["frames"] == 2
    assert rows["twin.jpg"]["caption"] == rows["twin.png"]["caption"]
    totals = read_manifest(out).totals
    assert (totals["samples"], totals["failed"], totals["filtered"], totals["animated"]) == (17, 5, 4, 1)
    printed = capsys.readouterr().out
    assert "warning: 1 images share their name and caption with another; first twin.png" in printed
    assert "1  failed: truncated image; first cut.jpg" in printed


def test_missing_captions_as_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    base = photos_in(tmp_path / "in", 3)
    (base / "001.txt").unlink()
    assert pack(base, tmp_path / "empty", "--on_missing_caption", "empty") == 0
    assert read_manifest(tmp_path / "empty").totals["empty_captions"] == 1
    assert pack(base, tmp_path / "error", "--on_missing_caption", "error") == 2
    assert "error: 001.jpg has no caption (looked for 001.txt and 001.caption): write one" in capsys.readouterr().err
    assert pack(base, tmp_path / "skip") == 0 and read_manifest(tmp_path / "skip").totals["filtered"] == 1


def test_duplicates(tmp_path: Path) -> None:
    base = photos_in(tmp_path / "in", 4)
    (base / "900.jpg").write_bytes((base / "001.jpg").read_bytes())
    (base / "901.jpg").write_bytes(encoded(opened((base / "002.jpg").read_bytes()), quality=70) if False else
                                   encoded(opened((base / "002.jpg").read_bytes()), "WEBP", quality=80))  # fmt: skip
    for name in ("900", "901"):
        (base / f"{name}.txt").write_text("again")
    for mode, samples in (("none", 6), ("exact", 5), ("perceptual", 4)):
        assert pack(base, tmp_path / mode, "--remove_duplicates", mode) == 0
        assert read_manifest(tmp_path / mode).totals["samples"] == samples, mode
    row = rows_of(tmp_path / "perceptual")["901.jpg"]
    assert (row["status"], row["reason"], row["detail"]) == ("filtered", "duplicate", "of 002.jpg")


def test_too_many_failures_stop_the_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    base = photos_in(tmp_path / "in", 2)
    for number in range(3):
        (base / f"bad{number}.jpg").write_bytes(b"nonsense")
        (base / f"bad{number}.txt").write_text("x")
    assert pack(base, tmp_path / "out") == 2
    error = capsys.readouterr().err
    assert "error: 3 of 5 inputs failed, more than --max_failed_ratio 0.5; first bad0.jpg: not an image" in error
    assert not (tmp_path / "out" / "manifest.json").exists()
    assert pack(base, tmp_path / "out", "--max_failed_ratio", "0.8") == 0  # the plan is kept


# ── the same bytes, always ───────────────────────────────────────────────────────────────────────────────────────────


def test_bytes_do_not_depend_on_who_packs(tmp_path: Path) -> None:
    base = photos_in(tmp_path / "in", 9)
    (base / "bad.jpg").write_bytes(b"nonsense")
    (base / "bad.txt").write_text("x")
    small = ("--samples_per_shard", "2")
    assert pack(base, tmp_path / "0", *small) == 0
    reference = hashes(tmp_path / "0")
    assert len(reference) == 5 * 3 + 3 + 2  # tar, rows, stats; index, manifest, sizes; plan
    for count in ("1", "2", "3"):
        assert pack(base, tmp_path / count, *small, "--num_workers", count) == 0
        assert hashes(tmp_path / count) == reference, count
    for task in ("2", "0", "1"):
        assert not (tmp_path / "array" / "manifest.json").exists()
        assert pack(base, tmp_path / "array", *small, "--task_id", task, "--num_tasks", "3") == 0
    assert hashes(tmp_path / "array") == reference


def test_the_torch_kernel_gives_the_same_bytes_in_a_worker(tmp_path: Path) -> None:
    base = photos_in(tmp_path / "in", 3)
    for count in ("0", "1"):
        assert pack(base, tmp_path / count, "--resize", "auto", "--num_workers", count) == 0
    assert hashes(tmp_path / "0") == hashes(tmp_path / "1")


def test_restart_skips_what_is_committed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    base, out = photos_in(tmp_path / "in", 6), tmp_path / "out"
    assert pack(base, out, "--samples_per_shard", "2") == 0
    reference = hashes(out)
    kept = (out / "000000.tar").stat().st_ino
    (out / "manifest.json").unlink()
    (out / "000001_stats.json").unlink()
    (out / "000002.tar").write_bytes(b"short")
    assert pack(base, out, "--samples_per_shard", "2") == 0
    assert hashes(out) == reference and (out / "000000.tar").stat().st_ino == kept
    assert "1 of 3 shards are there already" in capsys.readouterr().out


def test_changed_options_and_inputs_are_refused_with_the_difference(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    base, out = photos_in(tmp_path / "in", 3), tmp_path / "out"
    assert pack(base, out) == 0
    assert pack(base, out, "--quality", "80") == 2
    assert "begun with other options or inputs (quality 95 -> 80): choose another" in capsys.readouterr().err
    (base / "001.txt").write_text("another caption")
    (base / "002.jpg").unlink()
    (base / "new.jpg").write_bytes((base / "000.jpg").read_bytes())
    assert pack(base, out) == 2
    difference = "1 inputs new, first new.jpg; 1 inputs changed, first 001.jpg; 1 inputs gone, first 002.jpg"
    assert difference in capsys.readouterr().err


def test_full_disk(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    base, out = photos_in(tmp_path / "in", 6), tmp_path / "out"
    write, written = shards.TarShardWriter._write, [0]

    def until_full(self: shards.TarShardWriter, data: bytes) -> None:
        written[0] += len(data)
        if written[0] > 25_000:
            raise OSError(errno.ENOSPC, "No space left on device")
        write(self, data)

    monkeypatch.setattr(shards.TarShardWriter, "_write", until_full)
    assert pack(base, out, "--samples_per_shard", "1") == 2
    error = capsys.readouterr().err
    assert "is full; finished shards stay valid: make room and start again" in error
    committed = len(list(out.glob("*_stats.json")))
    assert 0 < committed < 6 and not list(out.glob(".partial*"))
    monkeypatch.undo()
    assert pack(base, out, "--samples_per_shard", "1") == 0
    assert pack(base, tmp_path / "fresh", "--samples_per_shard", "1") == 0
    assert hashes(out) == hashes(tmp_path / "fresh")


# ── errors ───────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_one_line_for_each_mistake(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    base = photos_in(tmp_path / "in", 1)
    (tmp_path / "void").mkdir()
    (tmp_path / "void" / "a.mov").write_bytes(b"")
    (tmp_path / "file").write_bytes(b"")
    (tmp_path / "listed").mkdir()
    (tmp_path / "listed" / "metadata.csv").write_text("image,prompt\n")
    (base / "m.csv").write_text("image,prompt\n../x.jpg,a\n")
    cases: list[tuple[Path, Path, list[str], str]] = [
        (tmp_path / "no", tmp_path / "o", [], "no: no such folder"),
        (tmp_path / "void", tmp_path / "o", [], "void: 1 files seen (1 .mov), looked for .avif .bmp .gif .jfif"),
        (tmp_path / "listed", tmp_path / "o", [], "metadata.csv lists no images"),
        (base, tmp_path / "file", [], "file: is a file, not a folder"),
        (base, tmp_path / "file" / "out", [], "out: cannot be written to (Not a directory)"),
        (base, Path("/proc/out"), [], "/proc/out: cannot be written to"),
        (base, tmp_path / "o", ["--dataset_metadata_path", str(base / "m.csv")], "lies outside of --dataset_base_path"),
        (base, tmp_path / "o", ["--task_id", "3"], "0 <= task_id < num_tasks"),
        (base, tmp_path / "o", ["--background", "white"], "--background white: must be whole numbers"),
        (base, tmp_path / "o", ["--samples_per_shard", "0"], "--samples_per_shard 0: must be from 1"),
        (base, tmp_path / "o", ["--min_pixels", "999999"], "none of 1 images can be used: 1 filtered: too few pixels"),
    ]
    for source, out, flags, message in cases:
        assert pack(source, out, *flags) == 2, message
        error = capsys.readouterr().err.splitlines()[-1]
        assert error.startswith("error: ") and message in error, error
    for flags, message in (
        (["--height", "500", "--width", "512"], "--height 500: must be a multiple of 16, for instance 496"),
        (["--height", "512"], "--height and --width belong together"),
        (["--resolutions", "512,a"], "--resolutions 512,a: must be whole numbers"),
    ):
        assert make_shards.main(["--dataset_base_path", str(base), "--output_path", str(tmp_path / "o"), *flags]) == 2
        assert message in capsys.readouterr().err
    with pytest.raises(SystemExit):
        pack(base, tmp_path / "o", "--max_upscale", "1/0")
    assert "argument --max_upscale: invalid" in capsys.readouterr().err
    assert pack(base, tmp_path / "o", "--resolutions", "512") == 2
    assert "--max_pixels and --resolutions exclude each other" in capsys.readouterr().err


def test_dry_run_writes_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    base = photos_in(tmp_path / "in", 5)
    (base / "bad.jpg").write_bytes(b"nonsense")
    (base / "bad.txt").write_text("x")
    assert pack(base, tmp_path / "out", "--dry_run") == 0
    printed = capsys.readouterr().out
    assert "6 inputs -> 5 samples in 1 shards" in printed and "1  failed: not an image; first bad.jpg" in printed
    assert "by converting 5 of them, 0 failed); nothing was written" in printed
    assert not (tmp_path / "out").exists()


def test_plan_only_then_tasks(tmp_path: Path) -> None:
    base, out = photos_in(tmp_path / "in", 3), tmp_path / "out"
    assert pack(base, out, "--plan_only") == 0
    assert [path.name for path in out.iterdir()] == ["plan"]
    assert pack(base, out) == 0 and read_manifest(out).totals["samples"] == 3


# ── killed ───────────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("kills", [2, pytest.param(20, marks=pytest.mark.slow)])
def test_killed_at_random_and_started_again(tmp_path: Path, kills: int) -> None:
    base, out = photos_in(tmp_path / "in", 40), tmp_path / "out"
    flags = [*SMALL, "--samples_per_shard", "2"]
    assert make_shards.main(["--dataset_base_path", str(base), "--output_path", str(tmp_path / "once"), *flags]) == 0
    command = [
        sys.executable,
        "-m",
        "data_prep.make_shards",
        "--dataset_base_path",
        str(base),
        "--output_path",
        str(out),
    ]
    rng = random.Random(1)
    killed = 0
    while killed < kills:
        flags[flags.index("--num_workers") + 1] = rng.choice("01")
        run = subprocess.Popen([*command, *flags], cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        # Not before it has begun to write, then at any time: within a shard, between two, while finalising.
        while run.poll() is None and not (out / "plan").exists():
            time.sleep(0.01)
        time.sleep(rng.uniform(0.2, 1.2))
        run.kill()
        killed += run.wait() == -signal.SIGKILL
        if (out / "manifest.json").exists():  # it was done: make it begin somewhere again
            (out / "manifest.json").unlink()
            for shard in rng.sample(range(20), 10):
                (out / f"{shard:06d}_stats.json").unlink()
    assert subprocess.run([*command, *flags], cwd=ROOT, capture_output=True, check=False).returncode == 0
    assert hashes(out) == hashes(tmp_path / "once")
