"""Two packers, damaged state files, damaged shards: nothing is overwritten, what is ours is rebuilt."""

from __future__ import annotations

import hashlib
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from data_prep import make_shards
from data_prep.packing.output_folder import LOCKS, output_lock
from data_prep.packing.plan import PLAN_FOLDER
from files.folder_lock import FolderInUse
from tests.helpers.photos import encoded, photo

ROOT = Path(__file__).parents[3]
SMALL = ["--max_pixels", "4096", "--num_workers", "0", "--resize", "pillow", "--samples_per_shard", "2"]


@pytest.fixture
def base(tmp_path: Path) -> Path:
    folder = tmp_path / "in"
    folder.mkdir()
    for number in range(8):
        (folder / f"{number}.jpg").write_bytes(encoded(photo(90, 80, seed=number)))
        (folder / f"{number}.txt").write_text("caption")
    return folder


def pack(base: Path, out: Path, *flags: str) -> int:
    return make_shards.main(["--dataset_base_path", str(base), "--output_path", str(out), *SMALL, *flags])


def command_of(base: Path, out: Path) -> list[str]:
    folders = ["--dataset_base_path", str(base), "--output_path", str(out)]
    return [sys.executable, "-m", "data_prep.make_shards", *folders, *SMALL]


def hashes(folder: Path) -> dict[str, str]:
    files = [path for path in folder.rglob("*") if path.is_file()]
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


# ── two packers ──────────────────────────────────────────────────────────────────────────────────────────────────────


def test_a_second_packer_is_refused_with_the_first_one_s_name(
    base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    assert pack(base, tmp_path / "once") == 0
    (out / "plan").mkdir(parents=True)
    with output_lock(out / PLAN_FOLDER / LOCKS, "packing", 0, 1):
        (out / ".partial-000000.tar.elsewhere.1").write_bytes(b"the first one's work")
        assert pack(base, out) == 2
        error = capsys.readouterr().err
        assert f"in use by process {os.getpid()} on" in error and "packing, task 0 of 1" in error
        assert (out / ".partial-000000.tar.elsewhere.1").exists()
        assert pack(base, out, "--num_tasks", "2") == 2  # cuts the shards up in another way
        assert "packing, task 0 of 1" in capsys.readouterr().err
        assert pack(base, out, "--dry_run") == 0  # only looks
    assert pack(base, out) == 0 and hashes(out) == hashes(tmp_path / "once")  # no lock is left


def test_tasks_of_one_array_share_the_folder(base: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    assert pack(base, tmp_path / "once") == 0
    (out / "plan").mkdir(parents=True)
    with output_lock(out / PLAN_FOLDER / LOCKS, "packing", 1, 2):
        assert pack(base, out, "--num_tasks", "2") == 0
        with pytest.raises(FolderInUse), output_lock(out / PLAN_FOLDER / LOCKS, "packing", 1, 2):
            pass
    assert pack(base, out, "--num_tasks", "2", "--task_id", "1") == 0 and hashes(out) == hashes(tmp_path / "once")


def test_two_packers_at_the_same_moment(base: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    assert pack(base, tmp_path / "once") == 0
    command = [
        sys.executable,
        "-m",
        "data_prep.make_shards",
        "--dataset_base_path",
        str(base),
        "--output_path",
        str(out),
        *SMALL,
    ]
    runs = [
        subprocess.Popen(command, cwd=ROOT, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True)
        for _ in range(2)
    ]
    ends = [(run.wait(), run.stderr.read() if run.stderr else "") for run in runs]
    assert 0 in [code for code, _ in ends]
    assert all(code == 0 or "in use by process" in text for code, text in ends), ends
    assert pack(base, out) == 0 and hashes(out) == hashes(tmp_path / "once")


def test_a_killed_packer_s_lock_is_taken_over(base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "out"
    command = [
        sys.executable,
        "-m",
        "data_prep.make_shards",
        "--dataset_base_path",
        str(base),
        "--output_path",
        str(out),
        *SMALL,
    ]
    run = subprocess.Popen(command, cwd=ROOT, stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL)
    while run.poll() is None and not list(out.glob("plan/lock/*/.lock-0*")):
        time.sleep(0.005)
    run.kill()
    killed = run.wait() == -signal.SIGKILL
    assert pack(base, out) == 0
    assert not killed or "which has ended without a word" in capsys.readouterr().out
    assert pack(base, tmp_path / "once") == 0 and hashes(out) == hashes(tmp_path / "once")


# ── damaged files of our own ─────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    "name",
    ["plan/plan.json", "plan/plan.parquet", "sizes.json", "index.parquet", "manifest.json", "000001_stats.json",
     "000001.parquet", "000001.tar"],
)  # fmt: skip
@pytest.mark.parametrize("damage", ["empty", "flipped", "of another kind", "deep"])
def test_every_damaged_file_is_made_again(base: Path, tmp_path: Path, name: str, damage: str) -> None:
    out = tmp_path / "out"
    assert pack(base, out) == 0
    before, path = hashes(out), out / name
    data = bytearray(path.read_bytes())
    if damage == "flipped":  # in place, at equal size
        data[len(data) // 2] ^= 1
    content = {"empty": b"", "of another kind": b'{"of": "another version"}', "deep": b"[" * 100_000}
    path.write_bytes(content.get(damage, bytes(data)))
    if damage == "flipped" and name.endswith(("sizes.json", "manifest.json")) and hashes(out) == before:
        return
    assert pack(base, out) == 0
    assert hashes(out) == before


def test_a_damaged_plan_lets_no_other_options_in(
    base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    assert pack(base, out) == 0
    (out / "plan" / "plan.json").write_bytes(b"{")
    before = hashes(out)
    assert pack(base, out, "--quality", "80") == 2
    assert "was begun with other options or inputs, or by another version" in capsys.readouterr().err
    assert hashes(out) == before
    assert pack(base, out) == 0


def test_the_plugins_stand_in_the_plan(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from data_prep.images import formats

    monkeypatch.setattr(formats, "installed_plugins", lambda: ())
    assert pack(base, tmp_path / "out") == 0
    monkeypatch.setattr(formats, "installed_plugins", lambda: ("heic",))
    assert pack(base, tmp_path / "out") == 2
    assert "image_plugins [] -> ['heic']" in capsys.readouterr().err


@pytest.mark.parametrize("damage", [b"", b"PAR1", b"PAR1 cut off in the middle"])
def test_rows_that_were_cut_off_before_their_set_was_copied_are_made_again(
    base: Path, tmp_path: Path, damage: bytes
) -> None:
    """A copy's statistics are newer than its rows, so that the sha256 isn't looked at."""
    out = tmp_path / "out"
    assert pack(base, out) == 0
    whole = hashes(out)
    (out / "000001.parquet").write_bytes(damage)
    stats = (out / "000001_stats.json").read_bytes()
    time.sleep(0.05)
    (out / "000001_stats.json").write_bytes(stats)
    assert pack(base, out) == 0
    assert hashes(out) == whole


@pytest.mark.parametrize(
    "name", ["000001_stats.json", "sizes.json", "manifest.json", "plan/plan.json", "plan/plan.parquet"]
)
def test_a_fifo_in_the_place_of_our_own_file_is_damage(base: Path, tmp_path: Path, name: str) -> None:
    out = tmp_path / "out"
    assert pack(base, out) == 0
    whole = hashes(out)
    (out / name).unlink()
    os.mkfifo(out / name)
    check = [sys.executable, "-m", "data_prep.check_shards", str(out), "--quick", "--num_workers", "0"]
    found = subprocess.run(check, capture_output=True, text=True, timeout=60, cwd=ROOT)
    assert found.returncode in (1, 2) and "error: " in found.stderr and "Traceback" not in found.stderr
    again = subprocess.run(command_of(base, out), capture_output=True, text=True, timeout=60, cwd=ROOT)
    assert again.returncode == 0, again.stderr
    assert hashes(out) == whole
