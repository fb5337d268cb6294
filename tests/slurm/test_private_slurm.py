"""A real Slurm on this host: what a cluster does to a job, and what becomes of the job. Skipped where Slurm can't be.

Jobs of a test overlap; `make test-slurm` has two workers besides, each with a Slurm of its own.
"""

from __future__ import annotations

import json
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from data_prep import make_shards
from tests.helpers.photos import encoded, photo
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
FAULTY = f"{sys.executable} {SLURM.parent / 'tests/helpers/faulty_python.py'}"


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
        return self.slurm.submit(self.root, *shape, *words, **({"PYTHON": sys.executable} | variables))

    def losses(self, name: str) -> list[tuple[int, float]]:
        path = self.root / name / "metrics.jsonl"
        rows = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
        return [(row["step"], row["loss"]) for row in rows if "loss" in row]

    def trains(self, name: str) -> None:
        until(150, lambda: len(self.losses(name)) >= 60)

    def rank(self, job: int, node: str) -> int:
        """Process id of the job's trainer on a node."""
        return self.find(b"train/train_lora.py", node, b"SLURM_JOB_ID=%d" % job)

    def find(self, script: bytes, node: str, variable: bytes = b"") -> int:
        """Process id of python with that script on a node, with `variable` in its environment."""
        for pid in self.slurm.processes(node):
            try:
                command = Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0")
                environment = Path(f"/proc/{pid}/environ").read_bytes().split(b"\0")
            except OSError:
                continue
            if command[:2] == [sys.executable.encode(), script] and (not variable or variable in environment):
                return pid
        raise AssertionError(f"no {script!r} on {node}")

    def scontrol(self, *words: object) -> None:
        self.slurm.run("scontrol", *map(str, words))

    def history(self, job: int) -> list[str]:
        path = self.root / f"qwen_lora-{job}" / "history"
        return path.read_text().splitlines() if path.exists() else []

    def log(self, job: int, name: str = "qwen_lora") -> list[str]:
        return (self.root / f"{name}-{job}.log").read_text().splitlines()


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
        assert [line.split()[1] for line in cluster.history(job)] == ["85" if name == "noticed" else "75", "0"]
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
    assert len(cluster.history(job)) == 3
    assert any("given up after 2 restarts without progress" in line for line in cluster.log(job))


def test_the_check_says_what_would_wait_for_ever(cluster: Cluster) -> None:
    command = ["slurm/check.sh", *SHAPE, "--gpus-per-node=7", "slurm/qwen_lora.sh", "run.yaml"]
    environment = cluster.slurm.environment | {"PYTHON": sys.executable}
    done = subprocess.run(command, cwd=cluster.root, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 1 and "error: sbatch refuses it" in done.stdout, done.stdout + done.stderr
    command.remove("--gpus-per-node=7")
    done = subprocess.run(command, cwd=cluster.root, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


def test_one_ranks_error_ends_all_within_15_seconds_and_is_the_last_line(cluster: Cluster) -> None:
    faults = {
        "sample": ("sample:", 2, "sample 000007 of train-000000.tar: cut off"),
        "memory": ("memory:CUDA out of memory. Tried to allocate 20.00 GiB.", 4, "make --batch_size smaller"),
        "input": (f"argument:{cluster.data}=/of/another/node", 2, "data: no folder at /of/another/node"),
    }
    jobs = {
        name: cluster.submit(name, "--on_broken_sample", "stop", PYTHON=FAULTY, FAULT_NODE="n2", FAULT=fault)
        for name, (fault, _, _) in faults.items()
    }
    for name, job in jobs.items():
        _, code, reason = faults[name]
        facts, folder = cluster.slurm.end(job, 150), cluster.root / f"qwen_lora-{job}"
        assert (facts["JobState"], facts["ExitCode"]) == ("FAILED", f"{code}:0"), name
        last = cluster.log(job)[-1]
        assert last.startswith("error: rank 1 on node n2: ") and reason in last
        assert sum(reason in line for line in cluster.log(job)) == 1
        for node in ("n1", "n2"):
            assert reason in (folder / f"{node}.log").read_text().splitlines()[-1]
        ended, began = (folder / "history").stat().st_mtime, (folder / "start-1" / "first_error").stat().st_mtime
        assert ended - began < 15, name


def test_a_port_that_is_taken_a_dead_node_at_relaunch_and_preemption_come_back(cluster: Cluster, curve) -> None:
    jobs = {"port": cluster.submit("port", flags=("--hold",))}
    with socket.socket() as taken:  # bound, but nobody listens: to a look it is free
        taken.bind(("0.0.0.0", 20000 + (jobs["port"] + 131) % 10000))
        cluster.scontrol("release", jobs["port"])
        jobs["relaunch"] = cluster.submit("relaunch", flags=("--nodelist=n[2-3]",))
        whole_nodes = ("--cpus-per-task=8", "--partition=low")
        jobs["preempted"] = cluster.submit("preempted", flags=whole_nodes)
        cluster.trains("relaunch")
        kill(int((cluster.slurm.folder / "slurmd.n3.pid").read_text()), signal.SIGKILL)
        kill(cluster.rank(jobs["relaunch"], "n2"), signal.SIGKILL)
        cluster.trains("preempted")
        high = ("--partition=high", "--nodelist=n4", "--cpus-per-task=8", "--output=/dev/null")
        cluster.slurm.submit(cluster.root, *high, "--wrap=sleep 5")
        until(
            200,
            lambda: cluster.history(jobs["port"]) and "back in the queue" in "\n".join(cluster.log(jobs["relaunch"])),
        )
    cluster.slurm.start_node("n3")
    assert "EADDRINUSE" in cluster.history(jobs["port"])[0]
    # Seen by srun, or, a little later, by Slurm
    found = ("rank 1 on node n3: did not start (srun: error: Task launch", "node n3 is not well: State=")
    assert any(text in line for line in cluster.log(jobs["relaunch"]) for text in found)
    for name, job in jobs.items():
        facts = cluster.slurm.end(job, 200)
        assert (facts["JobState"], facts["Restarts"]) == ("COMPLETED", "0" if name == "port" else "1"), name
        assert cluster.losses(name) == curve, name


def test_a_node_that_is_stuck_before_joining_is_named(cluster: Cluster) -> None:
    stuck = {"PYTHON": FAULTY, "FAULT": "stuck", "RESTARTS": "0", "CHECK_SECONDS": "5"}
    jobs = {
        node: cluster.submit(f"stuck_{node}", "--join_timeout", "15", FAULT_NODE=node, **stuck) for node in ("n1", "n2")
    }
    for node, job in jobs.items():
        assert cluster.slurm.end(job, 150)["ExitCode"] == "75:0"
        last = cluster.log(job)[-1]
        assert f"on node {node}: joining the process group took longer than allowed; no sign of rank" in last


def test_where_jobs_are_not_put_back_a_chain_of_them_goes_on_and_pythons_of_several_words_do(
    cluster: Cluster, curve
) -> None:
    container = cluster.root / "container"
    container.write_text(
        '#!/bin/bash\n[[ $1 == exec ]] || exit 9\nshift 3\nexec unshare --pid --fork --mount-proc "$@"\n'
    )
    container.chmod(0o755)
    prolog = cluster.root / "prolog"
    prolog.write_text('#!/bin/bash\necho "$SLURM_PROCID" >> "$SLURM_SUBMIT_DIR/prologs"\n')
    prolog.chmod(0o755)
    variables = {"PYTHON": f"{container} exec --nv image.sif {sys.executable}"}
    variables |= {"QWEN_LORA_SRUN_FLAGS": f"--task-prolog={prolog}"}
    flags = ("--no-requeue", "--dependency=singleton", "--job-name=chain")
    jobs = [cluster.submit("chain", flags=flags, **variables) for _ in range(3)]
    cluster.trains("chain")
    command = ["scancel", "--batch", "--signal=USR1", str(jobs[0])]
    subprocess.run(command, env=cluster.slurm.environment, check=True)
    codes = [cluster.slurm.end(job, 150)["ExitCode"] for job in jobs]
    assert codes == ["85:0", "0:0", "0:0"] and cluster.losses("chain") == curve
    log = "\n".join(cluster.log(jobs[0], "chain"))
    assert "Slurm doesn't put it back" in log and "back in the queue" not in log
    assert sorted((cluster.root / "prologs").read_text().split()) == ["0", "0", "0", "1", "1", "1"]


def test_the_environment_need_not_be_handed_on(cluster: Cluster) -> None:
    (cluster.root / ".venv").symlink_to(Path(sys.executable).parents[1])
    copied = ("--local_model_copy", "$SLURM_SUBMIT_DIR/disk")  # known on the nodes alone
    job = cluster.submit("unexported", "--max_steps", "20", *copied, flags=("--export=NONE",))
    assert cluster.slurm.end(job)["JobState"] == "COMPLETED", cluster.log(job)[-20:]
    lines = [line for line in cluster.log(job) if line.startswith("weights: ")]
    assert sorted(line.split()[1] for line in lines) != ["found", "found"] and str(cluster.root / "disk") in lines[0]


def test_a_killed_task_of_an_array_finishes_alone(cluster: Cluster, tmp_path: Path) -> None:
    photos = tmp_path / "photos"
    photos.mkdir()
    for number in range(120):
        (photos / f"{number}.jpg").write_bytes(encoded(photo(700, 500, seed=number % 4)))
        (photos / f"{number}.txt").write_text(f"caption {number}")
    words = ["--dataset_base_path", str(photos), "--max_pixels", "65536", "--samples_per_shard", "5"]
    assert make_shards.main([*words, "--output_path", str(tmp_path / "once"), "--num_workers", "0"]) == 0
    flags = [
        "--array=0-1",
        "--cpus-per-task=1",
        "--nodelist=n1",
        "slurm/make_shards.sh",
        "--output_path",
        str(tmp_path / "array"),
    ]
    job = cluster.slurm.submit(cluster.root, *flags, *words, PYTHON=sys.executable, OMP_NUM_THREADS="1")
    until(60, lambda: len(list((tmp_path / "array").glob("*.tar"))) >= 2)
    kill(cluster.find(b"data_prep/make_shards.py", "n1"), signal.SIGKILL)  # of the two that are there
    facts = [cluster.slurm.end(f"{job}_{task}", 100) for task in range(2)]
    assert [one["JobState"] for one in facts] == ["COMPLETED"] * 2
    assert sorted(one["Restarts"] for one in facts) == ["0", "1"]
    for path in (tmp_path / "once").rglob("*.*"):
        assert path.read_bytes() == (tmp_path / "array" / path.relative_to(tmp_path / "once")).read_bytes(), path.name
