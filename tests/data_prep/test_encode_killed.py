"""encode_shards.py killed at random and started again: in the end the bytes of a run that nobody disturbed."""

from __future__ import annotations

import hashlib
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from data_prep import make_shards
from tests.helpers.photos import encoded, photo

ROOT = Path(__file__).parents[2]
SHARDS = 24


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A shard for each of 24 photographs, in two buckets."""
    base, out = tmp_path_factory.mktemp("photos"), tmp_path_factory.mktemp("data") / "shards"
    for number in range(SHARDS):
        size = (96, 64) if number % 3 else (64, 96)
        (base / f"{number:02d}.png").write_bytes(encoded(photo(*size, seed=number), "PNG"))
        (base / f"{number:02d}.txt").write_text(f"photo number {number % 5}")
    flags = ["--dataset_base_path", str(base), "--output_path", str(out), "--max_pixels", "6144"]
    assert make_shards.main([*flags, "--num_workers", "0", "--resize", "pillow", "--samples_per_shard", "1"]) == 0
    return out


def start(model: Path, images: Path, out: Path, world: int) -> list[subprocess.Popen[bytes]]:
    command = [sys.executable, str(ROOT / "data_prep" / "encode_shards.py"), "--model", str(model)]
    command += ["--data", str(images), "--output_path", str(out)]
    ranks = [os.environ | {"RANK": str(rank), "WORLD_SIZE": str(world)} for rank in range(world)]
    quiet = subprocess.DEVNULL
    return [subprocess.Popen(command, cwd="/", env=environment, stdout=quiet, stderr=quiet) for environment in ranks]


def hashes(folder: Path) -> dict[str, str]:
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in sorted(folder.iterdir())}


@pytest.mark.slow
@pytest.mark.parametrize("world", [1, 2])
def test_killed_at_random_and_started_again(world: int, images: Path, tiny_model: Path, tmp_path: Path) -> None:
    once, out = tmp_path / "once", tmp_path / "out"
    assert [rank.wait() for rank in start(tiny_model, images, once, 1)] == [0]
    rng, kills = random.Random(world), 0
    for _ in range(8):
        ranks = start(tiny_model, images, out, world)
        before = len(list(out.glob("*_stats.json"))) if out.exists() else 0
        # Not while it imports, then at any time: within a shard, between two, while the manifest is written.
        wanted = before + rng.randint(0, 3)
        while all(rank.poll() is None for rank in ranks) and len(list(out.glob("*_stats.json"))) < wanted:
            time.sleep(0.01)
        time.sleep(rng.uniform(0, 0.3))
        for rank in ranks:
            rank.kill()
        kills += sum(rank.wait() == -signal.SIGKILL for rank in ranks)
        if (out / "manifest.json").exists():  # it was done: make it begin somewhere again
            (out / "manifest.json").unlink()
            for name in rng.sample(sorted(out.glob("*_stats.json")), 8):
                name.unlink()
    assert kills >= 6 * world
    assert [rank.wait() for rank in start(tiny_model, images, out, world)] == [0] * world
    assert hashes(out) == hashes(once)
