"""A second run over inputs that were touched since: copies go on, edits of equal size are refused."""

from __future__ import annotations

import hashlib
import os
import shutil
from pathlib import Path

import pytest

from data_prep import make_shards
from data_prep.packing import workers
from data_prep.shard_format.shards import ShardReader, read_index
from tests.helpers.photos import encoded, photo

SMALL = ["--max_pixels", "4096", "--num_workers", "0", "--resize", "pillow", "--samples_per_shard", "2"]


def pack(base: Path, out: Path, *flags: str) -> int:
    return make_shards.main(["--dataset_base_path", str(base), "--output_path", str(out), *SMALL, *flags])


def hashes(folder: Path) -> dict[str, str]:
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in folder.rglob("*.*")}


@pytest.fixture
def base(tmp_path: Path) -> Path:
    """Six photographs and a file that is none."""
    folder = tmp_path / "in"
    folder.mkdir()
    for number in range(6):
        (folder / f"{number}.png").write_bytes(encoded(photo(90, 80, seed=number), "PNG") + b"behind the end mark")
        (folder / f"{number}.txt").write_text("caption")
    (folder / "page.jpg").write_bytes(b"<html>")
    (folder / "page.txt").write_text("caption")
    return folder


def edit(path: Path, *, keep_time: bool = False) -> None:
    """Other content of the same number of bytes."""
    before, status = path.read_bytes(), path.stat()
    path.write_bytes(before[:-1] + bytes([before[-1] ^ 1]))
    if keep_time:
        os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))
    assert path.stat().st_size == status.st_size


@pytest.mark.parametrize("keep_time", [False, True])
def test_an_edit_of_equal_size_is_refused(
    base: Path, tmp_path: Path, keep_time: bool, capsys: pytest.CaptureFixture[str]
) -> None:
    assert pack(base, tmp_path / "out") == 0
    edit(base / "3.png", keep_time=keep_time)
    before = hashes(tmp_path / "out")
    assert pack(base, tmp_path / "out") == 2
    assert "1 inputs were edited after they had been packed into" in (error := capsys.readouterr().err)
    assert "first 3.png: choose another --output_path" in error
    assert hashes(tmp_path / "out") == before


def test_a_copied_folder_goes_on(base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out, read = tmp_path / "out", []
    assert pack(base, out) == 0
    reference = hashes(out)
    monkeypatch.setattr(
        workers, "_read", lambda file, item, read_all=workers._read: read.append(item.path) or read_all(file, item)
    )
    assert pack(base, out) == 0 and not read  # nothing is newer than the plan: nothing is read
    copy = tmp_path / "moved"
    shutil.copytree(base, copy, copy_function=shutil.copyfile)
    (out / "000001_stats.json").unlink()
    assert pack(copy, out) == 0 and hashes(out) == reference
    assert sorted(read) == [f"{number}.png" for number in (0, 1, 2, 3, 4, 5)]  # 2 and 3 to pack, the others to compare


def test_what_is_not_packed_yet_is_packed_as_it_is_now(base: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    assert pack(base, out, "--plan_only") == 0
    edit(base / "0.png")
    assert pack(base, out) == 0
    index, reader = read_index(out), ShardReader(out)
    record = reader.read(int(index.shard[0]), int(index.json_offset[0]), int(index.json_size[0])).decode()
    assert hashlib.sha256((base / "0.png").read_bytes()).hexdigest() in record


def test_a_task_of_an_array_compares_its_own_share(
    base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    assert pack(base, out) == 0
    edit(base / "0.png")
    assert pack(base, out, "--task_id", "1", "--num_tasks", "2") == 0
    assert pack(base, out, "--task_id", "0", "--num_tasks", "2") == 2
    assert "first 0.png" in capsys.readouterr().err


def test_an_edit_within_a_tar_is_refused(base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert pack(base, tmp_path / "first") == 0
    tars = tmp_path / "tars"
    tars.mkdir()
    shutil.copy(tmp_path / "first" / "000000.tar", tars / "a.tar")
    assert pack(tars, tmp_path / "out") == 0
    index = read_index(tmp_path / "first")
    end = int(index.payload_offset[1] + index.payload_size[1])
    with (tars / "a.tar").open("r+b") as file:
        file.seek(end - 40)
        file.write(b"\x11")
    assert pack(tars, tmp_path / "out") == 2
    assert f"first a.tar/{index.key[1]}.jpg" in capsys.readouterr().err
