"""Samples that can't be read, met by any rank of the real command under a launcher: each is named, and the end counts all."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.helpers.data_sets import break_sample
from tests.helpers.training_run import ROOT
from train.data.shard_dataset import ShardDataset


def run_two_ranks(model: Path, data: Path, output: Path, *more: str) -> subprocess.CompletedProcess[str]:
    flags = ["--deepspeed", "zero2.json", "--model", str(model), "--data", str(data), "--output_path", str(output)]
    flags += ["--dtype", "float32", "--lora_rank", "2", "--lora_target_modules", "to_q", "--num_workers", "0"]
    flags += ["--wandb_mode", "disabled", "--max_steps", "6", "--activation_checkpointing", "full", *more]
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2", "--standalone"]
    command += [str(ROOT / "train" / "train_lora.py"), *flags]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=240)


def broken_at(folder: Path, data: Path, *places: int) -> Path:
    """A copy of the data whose samples at these places of the order of training can't be read; odd ones are of rank 1."""
    copy = shutil.copytree(data, folder)
    order = ShardDataset(copy).order(1)
    for place in places:
        break_sample(copy, int(order.micro_batch(place)[1][0]))
    return copy


def test_the_count_at_the_end_is_that_of_all_ranks(small_model, small_data, tmp_path):
    done = run_two_ranks(small_model, broken_at(tmp_path / "data", small_data, 1, 5), tmp_path / "run")
    assert done.returncode == 0, done.stderr[-3000:]
    (last,) = [line for line in done.stderr.splitlines() if "done: " in line]
    assert "(2 broken samples replaced or left out)" in last
    named = [line for line in done.stderr.splitlines() if line.startswith("broken sample replaced by its neighbour: ")]
    assert len(named) == 2 and all(line.endswith(" (rank 1)") for line in named)


@pytest.mark.parametrize("place,rank", [(5, 1), (4, 0)])
def test_one_that_stops_the_run_costs_no_step(small_model, small_data, tmp_path, place, rank):
    """Step 3 has no data on one rank: both save the two before it, and leave together."""
    data, output = broken_at(tmp_path / "data", small_data, place), tmp_path / "run"
    done = run_two_ranks(small_model, data, output, "--on_broken_sample", "stop", "--save_steps", "0")
    assert (
        done.returncode != 0 and "Traceback (most recent call last):\n  File" not in done.stderr.partition("torch")[0]
    )
    (last,) = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert "000000.tar: " in last and ("(rank 1)" in last) == bool(rank)
    assert "checkpoint of step 2 saved, exit code 2; when the data can be read, start the same command again" in last
    assert [path.name for path in output.glob("checkpoints/step-*")] == ["step-00000002"]
