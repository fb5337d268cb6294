"""Samples that can't be read, met by any rank of the real command under a launcher: each is named, and the end counts all."""

import os
import shutil
import subprocess
import sys

from tests.helpers.data_sets import break_sample
from tests.helpers.training_run import ROOT
from train.data.shard_dataset import ShardDataset


def test_the_count_at_the_end_is_that_of_all_ranks(small_model, small_data, tmp_path):
    data = shutil.copytree(small_data, tmp_path / "data")
    order = ShardDataset(data).order(1)
    met_by_rank_1 = [int(order.micro_batch(place)[1][0]) for place in (1, 5)]
    for sample in met_by_rank_1:
        break_sample(data, sample)
    flags = ["--deepspeed", "zero2.json", "--model", str(small_model), "--data", str(data)]
    flags += [
        "--output_path",
        str(tmp_path / "run"),
        "--dtype",
        "float32",
        "--lora_rank",
        "2",
        "--lora_target_modules",
        "to_q",
    ]
    flags += [
        "--num_workers",
        "0",
        "--wandb_mode",
        "disabled",
        "--max_steps",
        "6",
        "--activation_checkpointing",
        "full",
    ]
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2", "--standalone"]
    command += [str(ROOT / "train" / "train_lora.py"), *flags]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr[-3000:]
    (last,) = [line for line in done.stderr.splitlines() if "done: " in line]
    assert "(2 broken samples replaced or left out)" in last
    named = [line for line in done.stderr.splitlines() if line.startswith("broken sample replaced by its neighbour: ")]
    assert len(named) == 2 and all(line.endswith(" (rank 1)") for line in named)
