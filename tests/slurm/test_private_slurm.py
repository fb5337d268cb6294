"""A real Slurm on this host: what a cluster does to a job, and what becomes of the job. Skipped where Slurm can't be.

The events overlap: all jobs are submitted first, then each test waits for its own.
"""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.helpers.private_slurm import PrivateSlurm, kill, until, why_not
from tests.helpers.slurm_stand_ins import SLURM

REASON = why_not()
pytestmark = [
    pytest.mark.skipif(REASON is not None, reason=REASON or ""),
    pytest.mark.slow,  # make test-slurm, which CI runs
]
PROJECT = ("slurm", "train", "files", "qwen_image", "data_prep", "ds_configs")
SHAPE = ["--nodes=2", "--gpus-per-node=0", "--ntasks-per-node=1", "--cpus-per-task=1"]
STEPS = 300


class Cluster:
    """A submit folder of the project, a small model and data, and the uninterrupted run's curve."""

    def __init__(self, slurm: PrivateSlurm, root: Path, model: Path, data: Path) -> None:
        self.slurm, self.root, self.model, self.data = slurm, root, model, data
        for name in PROJECT:
            (root / name).symlink_to(SLURM.parent / name)

    def submit(self, name: str, *more: str, flags: tuple[str, ...] = (), **variables: str) -> int:
        words = ["--deepspeed", "ds_configs/zero2.json", "--model", str(self.model), "--data", str(self.data)]
        words += ["--output_path", str(self.root / name), "--dtype", "float32", "--lora_rank", "2"]
        words += ["--lora_target_modules", "to_q", "--num_workers", "0", "--log_steps", "1", "--device", "cpu"]
        words += ["--wandb_mode", "disabled", "--max_steps", str(STEPS), "--checkpoint_steps", "50", *more]
        shape = [*SHAPE, *flags, "slurm/qwen_lora.sh"]
        return self.slurm.submit(self.root, *shape, *words, PYTHON=sys.executable, **variables)

    def losses(self, name: str) -> list[tuple[int, float]]:
        path = self.root / name / "metrics.jsonl"
        rows = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
        return [(row["step"], row["loss"]) for row in rows if "loss" in row]

    def trains(self, name: str) -> None:
        until(150, lambda: len(self.losses(name)) >= 60)

    def rank(self, job: int, node: str) -> int:
        """Process id of the job's trainer on a node."""
        for pid in self.slurm.processes(node):
            try:
                command = Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0")
                environment = Path(f"/proc/{pid}/environ").read_bytes().split(b"\0")
            except OSError:
                continue
            if (
                command[:2] == [sys.executable.encode(), b"train/train_lora.py"]
                and b"SLURM_JOB_ID=%d" % job in environment
            ):
                return pid
        raise AssertionError(f"no rank of job {job} on {node}")

    def log(self, job: int) -> list[str]:
        return (self.root / f"qwen_lora-{job}.log").read_text().splitlines()


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory, small_model: Path, small_data: Path) -> Iterator[Cluster]:
    root = tmp_path_factory.mktemp("slurm")
    slurm = PrivateSlurm(root / "cluster")
    try:
        (root / "submit").mkdir()
        yield Cluster(slurm, root / "submit", small_model, small_data)
    finally:
        slurm.stop()


@pytest.fixture(scope="module")
def curve(cluster: Cluster) -> list[tuple[int, float]]:
    job = cluster.submit("whole")
    assert cluster.slurm.end(job)["JobState"] == "COMPLETED", cluster.log(job)[-20:]
    assert f"last checkpoint: step {STEPS}, run folder {cluster.root / 'whole'}" in cluster.log(job)[-2]
    return cluster.losses("whole")


def test_a_killed_rank_a_stopped_rank_and_a_notice_come_back_with_the_same_curve(cluster: Cluster, curve) -> None:
    jobs = {name: cluster.submit(name, "--step_timeout", "10") for name in ("killed", "stopped", "noticed")}
    for name, job in jobs.items():
        cluster.trains(name)
        if name == "noticed":
            command = ["scancel", "--full", "--signal=USR1", str(job)]
            subprocess.run(command, env=cluster.slurm.environment, check=True)
        else:
            number = signal.SIGKILL if name == "killed" else signal.SIGSTOP
            kill(cluster.rank(job, "n2"), number)
    for name, job in jobs.items():
        facts = cluster.slurm.end(job, 250)
        assert (facts["JobState"], facts["Restarts"]) == ("COMPLETED", "1" if name == "noticed" else "0"), name
        assert cluster.losses(name) == curve, name
        history = (cluster.root / f"qwen_lora-{job}" / "history").read_text().splitlines()
        assert [line.split()[1] for line in history] == ["85" if name == "noticed" else "75", "0"]
    log = "\n".join(cluster.log(jobs["killed"]))
    assert "error: rank 1 on node n2: killed by signal 9 (KILL)" in log and "starting again on the same nodes" in log
    assert "no sign of rank 1 on node n2" in "\n".join(cluster.log(jobs["stopped"]))
    assert "back in the queue, to go on from step" in "\n".join(cluster.log(jobs["noticed"]))


def test_one_ranks_bad_input_ends_all_at_once_and_is_the_last_line(cluster: Cluster) -> None:
    began = time.monotonic()
    job = cluster.submit("bad", "--device", "auto", flags=("--gpus-per-node=1",))  # counted, and not there
    facts = cluster.slurm.end(job, 100)
    assert (facts["JobState"], facts["ExitCode"], facts["Restarts"]) == ("FAILED", "2:0", "0")
    assert time.monotonic() - began < 60
    assert cluster.log(job)[-1].startswith("error: rank ") and "--device cpu to go on without" in cluster.log(job)[-1]
    assert sum("no GPU on" in line for line in cluster.log(job)) <= 2


def test_of_two_jobs_on_one_folder_one_trains_and_the_other_says_why_not(cluster: Cluster, curve) -> None:
    first = cluster.submit("shared")
    time.sleep(0.5)
    jobs = [first, cluster.submit("shared")]
    states = [cluster.slurm.end(job, 150)["JobState"] for job in jobs]
    assert sorted(states) == ["COMPLETED", "FAILED"]
    refused = jobs[states.index("FAILED")]
    assert "shared is in use by process" in cluster.log(refused)[-1] and cluster.losses("shared") == curve


def test_a_start_without_progress_is_given_up_with_its_history(cluster: Cluster) -> None:
    broken = cluster.root / "broken_python"
    broken.write_text("#!/bin/sh\nkill -9 $$\n")
    broken.chmod(0o755)
    words = [*SHAPE, "slurm/qwen_lora.sh", "--output_path", "none"]
    job = cluster.slurm.submit(cluster.root, *words, PYTHON=str(broken), RESTARTS="2")
    facts = cluster.slurm.end(job, 100)
    assert (facts["JobState"], facts["ExitCode"]) == ("FAILED", "75:0")
    assert len((cluster.root / f"qwen_lora-{job}" / "history").read_text().splitlines()) == 3
    assert any("given up after 2 restarts without progress" in line for line in cluster.log(job))


def test_the_check_says_what_would_wait_for_ever(cluster: Cluster) -> None:
    command = ["slurm/check.sh", *SHAPE, "--gpus-per-node=7", "slurm/qwen_lora.sh", "run.yaml"]
    environment = cluster.slurm.environment | {"PYTHON": sys.executable}
    done = subprocess.run(command, cwd=cluster.root, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 1 and "error: sbatch refuses it" in done.stdout, done.stdout + done.stderr
    command.remove("--gpus-per-node=7")
    done = subprocess.run(command, cwd=cluster.root, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
