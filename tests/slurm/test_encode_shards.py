"""slurm/encode_shards.sh under stand-ins for srun and scontrol: what each task gets, and what brings the job back."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import time
from pathlib import Path

import pytest

from tests.helpers.slurm_stand_ins import SLURM, submit_folder, two_nodes

SCRIPT = SLURM / "encode_shards.sh"

ENCODER = """
import json, os, sys, time
names = ["RANK", "LOCAL_RANK", "WORLD_SIZE", "OMP_NUM_THREADS", "SRUN_CPUS_PER_TASK"]
with open("tasks.jsonl", "a") as file:
    file.write(json.dumps({"argv": sys.argv[1:], "cwd": os.getcwd(), **{name: os.environ[name] for name in names}}))
    file.write("\\n")
time.sleep(float(os.environ.get("ENCODER_TAKES", 0)))
sys.exit(2 if os.environ["RANK"] == os.environ.get("ENCODER_FAILS") else 0)
"""


@pytest.fixture
def cluster(tmp_path: Path) -> Path:
    """A submit folder with a stand-in for the encoder, and beside it a PATH folder with srun and scontrol."""
    return submit_folder(tmp_path, "data_prep/encode_shards.py", ENCODER)


def start(submit: Path, *arguments: str, **variables: str) -> subprocess.Popen[str]:
    """Start the script as a batch job of 2 nodes with 2 tasks each, from a foreign folder."""
    return subprocess.Popen(
        ["bash", str(SCRIPT), *arguments],
        cwd="/",
        env=two_nodes(submit, **variables),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )


def run(submit: Path, *arguments: str, **variables: str) -> tuple[int, str]:
    """Exit code and standard error."""
    process = start(submit, *arguments, **variables)
    _, errors = process.communicate(timeout=30)
    return process.returncode, errors


def tasks(submit: Path) -> list[dict]:
    return [json.loads(line) for line in (submit / "tasks.jsonl").read_text().splitlines()]


def test_each_task_gets_its_rank_and_all_flags(cluster: Path) -> None:
    code, errors = run(cluster, "--data", "my shards", "--model", "m")
    assert code == 0, errors
    ranks = [(task["RANK"], task["LOCAL_RANK"], task["WORLD_SIZE"]) for task in tasks(cluster)]
    assert ranks == [("0", "0", "4"), ("1", "1", "4"), ("2", "0", "4"), ("3", "1", "4")]
    for task in tasks(cluster):
        assert (task["OMP_NUM_THREADS"], task["SRUN_CPUS_PER_TASK"], task["cwd"]) == ("3", "3", str(cluster))
        assert task["argv"] == ["--data", "my shards", "--model", "m"]
    assert {"--gpu-bind=none", "--kill-on-bad-exit=0"} <= set((cluster / "srun_arguments").read_text().split())
    assert not (cluster / "requeued").exists()


def test_a_failed_task_leaves_the_others_at_work_and_fails_the_job(cluster: Path) -> None:
    code, _ = run(cluster, ENCODER_FAILS="1")
    assert code == 2 and len(tasks(cluster)) == 4
    assert not (cluster / "requeued").exists()


def test_the_end_of_the_time_puts_the_job_back(cluster: Path) -> None:
    process = start(cluster, ENCODER_TAKES="60")
    try:
        deadline = time.monotonic() + 20
        while not (cluster / "tasks.jsonl").exists() and time.monotonic() < deadline:
            time.sleep(0.05)
        process.send_signal(signal.SIGUSR1)
        assert process.wait(timeout=10) == 0
    finally:
        os.killpg(process.pid, signal.SIGKILL)
    assert (cluster / "requeued").read_text() == "requeue 1234567\n"
    assert len(tasks(cluster)) == 1


def test_without_gpus(cluster: Path) -> None:
    assert run(cluster, SLURM_GPUS_ON_NODE="")[0] == 0


def test_a_wrong_shape_or_folder_is_named_before_anything_starts(cluster: Path, tmp_path: Path) -> None:
    code, errors = run(cluster, SLURM_GPUS_ON_NODE="8")
    assert code == 2 and "2 tasks but 8 GPUs a node" in errors
    code, errors = run(cluster, SLURM_SUBMIT_DIR=str(tmp_path))
    assert code == 2 and "submit from the root directory of the project" in errors
    assert not (cluster / "tasks.jsonl").exists()


def test_the_header_signals_the_batch_shell_and_allows_requeuing() -> None:
    header = [line.split()[1] for line in SCRIPT.read_text().splitlines() if line.startswith("#SBATCH")]
    assert {"--signal=B:USR1@120", "--requeue", "--open-mode=append"} <= set(header)
