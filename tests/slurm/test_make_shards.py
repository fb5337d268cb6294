"""slurm/make_shards.sh with a stand-in for srun: an array of tasks packs what one process packs."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

from data_prep import make_shards
from tests.helpers.photos import encoded, photo
from tests.helpers.slurm_stand_ins import SLURM, environment, write_commands

ROOT = SLURM.parent
SCRIPT = SLURM / "make_shards.sh"


def submit(binaries: Path, task: int, array: tuple[int, int, int], *arguments: str) -> subprocess.CompletedProcess[str]:
    """Run the script as Slurm does for one task of an array (first id, last id, number of ids)."""
    write_commands(binaries, srun='#!/bin/sh\n[ "$2" = --cpus-per-task=1 ] || exit 9\nshift 2\nexec "$@"\n')
    names = ("MIN", "MAX", "COUNT")
    slurm = {f"SLURM_ARRAY_TASK_{name}": str(value) for name, value in zip(names, array, strict=True)}
    slurm |= {"SLURM_ARRAY_TASK_ID": str(task), "SLURM_CPUS_PER_TASK": "1"}
    command = ["bash", str(SCRIPT), *arguments]
    return subprocess.run(
        command, env=environment(ROOT, binaries, **slurm), cwd="/", capture_output=True, text=True, check=False
    )


def test_an_array_packs_what_one_process_packs(tmp_path: Path) -> None:
    base = tmp_path / "my photos"
    base.mkdir()
    for number in range(4):
        (base / f"{number}.jpg").write_bytes(encoded(photo(100, 90, seed=number)))
        (base / f"{number}.txt").write_text("caption")
    small = ["--max_pixels", "4096", "--resize", "pillow", "--samples_per_shard", "1"]
    once = ["--dataset_base_path", str(base), "--output_path", str(tmp_path / "once"), "--num_workers", "0", *small]
    assert make_shards.main(once) == 0
    array = ["--dataset_base_path", str(base), "--output_path", str(tmp_path / "array"), *small]
    for task in (2, 1):
        done = submit(tmp_path / "bin", task, (1, 2, 2), *array)
        assert done.returncode == 0, done.stderr
        committed = {path.name for path in (tmp_path / "array").glob("*_stats.json")}
        assert ("000000_stats.json" in committed, "000001_stats.json" in committed) == (task == 1, True)
    for path in (tmp_path / "once").rglob("*.*"):
        assert path.read_bytes() == (tmp_path / "array" / path.relative_to(tmp_path / "once")).read_bytes(), path.name


@pytest.mark.parametrize(("array", "message"), [((0, 4, 3), "array ids must follow each other")])
def test_refused(tmp_path: Path, array: tuple[int, int, int], message: str) -> None:
    done = submit(tmp_path / "bin", 0, array)
    assert done.returncode == 2 and message in done.stderr
