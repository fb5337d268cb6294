"""slurm/qwen_lora.sh under stand-ins for srun and scontrol: what each task gets, and what its exit code leads to."""

import json
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from tests.helpers.slurm_stand_ins import SLURM, submit_folder, two_nodes

SCRIPT = SLURM / "qwen_lora.sh"

TRAINER = """
import json, os, sys
names = ["RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT", "OMP_NUM_THREADS", "SRUN_CPUS_PER_TASK"]
with open("tasks.jsonl", "a") as file:
    file.write(json.dumps({"argv": sys.argv[1:], "cwd": os.getcwd(), **{name: os.environ[name] for name in names}}))
    file.write("\\n")
sys.exit(int(os.environ["TRAINER_EXITS"]))
"""


@pytest.fixture
def cluster(tmp_path: Path) -> Path:
    """A submit folder with a stand-in trainer, and beside it a PATH folder with srun and scontrol."""
    return submit_folder(tmp_path, "train/train_lora.py", TRAINER)


def run_script(submit: Path, *arguments: str, exits: int = 0, **variables: str) -> subprocess.CompletedProcess[str]:
    """Run the script as a batch job of 2 nodes with 2 tasks each, from a foreign folder."""
    environment = two_nodes(submit, TRAINER_EXITS=str(exits), **variables)
    return subprocess.run(
        ["bash", str(SCRIPT), *arguments], cwd="/", env=environment, capture_output=True, text=True, check=False
    )


@pytest.mark.parametrize("script", sorted(SLURM.glob("*.sh")), ids=lambda script: script.name)
def test_the_syntax_is_valid(script: Path) -> None:
    subprocess.run(["bash", "-n", str(script)], check=True)


def test_each_task_gets_its_rank_and_the_same_meeting_point(cluster: Path) -> None:
    ran = run_script(cluster, "my run.yaml", "--sample_prompts", "a cat, 'sitting'", "b")
    assert ran.returncode == 0, ran.stderr
    tasks = [json.loads(line) for line in (cluster / "tasks.jsonl").read_text().splitlines()]
    ranks = [(task["RANK"], task["LOCAL_RANK"], task["WORLD_SIZE"]) for task in tasks]
    assert ranks == [("0", "0", "4"), ("1", "1", "4"), ("2", "0", "4"), ("3", "1", "4")]
    for task in tasks:
        assert (task["MASTER_ADDR"], task["MASTER_PORT"]) == ("10.0.0.7", "24698")
        assert (task["OMP_NUM_THREADS"], task["SRUN_CPUS_PER_TASK"], task["cwd"]) == ("3", "3", str(cluster))
        assert task["argv"] == ["--config", "my run.yaml", "--sample_prompts", "a cat, 'sitting'", "b"]
    assert "job 1234567: start 1 on gpu[07-08]: 4 ranks, which meet at 10.0.0.7:24698" in ran.stdout.splitlines()
    assert "--gpu-bind=none" in (cluster / "srun_arguments").read_text()
    assert not (cluster / "requeued").exists()


def test_a_port_that_another_job_of_the_node_listens_on_is_passed_over(cluster: Path) -> None:
    with socket.create_server(("127.0.0.1", 24698)):
        assert run_script(cluster).returncode == 0
    ports = {json.loads(line)["MASTER_PORT"] for line in (cluster / "tasks.jsonl").read_text().splitlines()}
    assert ports == {"25695"}


@pytest.mark.parametrize("arguments", [[], ["--model", "m"]])
def test_the_file_may_be_left_out(cluster: Path, arguments: list[str]) -> None:
    assert run_script(cluster, *arguments).returncode == 0
    assert json.loads((cluster / "tasks.jsonl").read_text().splitlines()[0])["argv"] == arguments


@pytest.mark.parametrize(("exits", "requeued"), [(0, False), (1, False), (2, False), (85, True)])
def test_only_a_checkpoint_on_a_signal_puts_the_job_back(cluster: Path, exits: int, requeued: bool) -> None:
    assert run_script(cluster, exits=exits).returncode == exits
    assert (cluster / "requeued").exists() == requeued
    if requeued:
        assert (cluster / "requeued").read_text() == "requeue 1234567\n"


def test_a_start_whose_batch_shell_was_lost_is_counted(cluster: Path) -> None:
    """Else a rank of the past would find its own start to be the newest."""
    (cluster / "qwen_lora-1234567" / "start-1").mkdir(parents=True)
    assert run_script(cluster, SLURM_RESTART_COUNT="1").returncode == 0
    assert (cluster / "qwen_lora-1234567" / "current").read_text() == "start-2\n"
    assert run_script(cluster).returncode == 0
    assert (cluster / "qwen_lora-1234567" / "current").read_text() == "start-1\n"


def test_without_gpus(cluster: Path) -> None:
    assert run_script(cluster, SLURM_GPUS_ON_NODE="").returncode == 0


def test_a_wrong_shape_or_folder_is_named_before_anything_starts(cluster: Path, tmp_path: Path) -> None:
    shape = run_script(cluster, SLURM_GPUS_ON_NODE="8")
    assert shape.returncode == 2 and "2 tasks but 8 GPUs a node" in shape.stderr
    folder = run_script(cluster, SLURM_SUBMIT_DIR=str(tmp_path))
    assert folder.returncode == 2 and "submit from the root directory of the project" in folder.stderr
    assert not (cluster / "tasks.jsonl").exists()


def test_the_header_signals_the_batch_shell_and_allows_requeuing() -> None:
    header = [line.split()[1] for line in SCRIPT.read_text().splitlines() if line.startswith("#SBATCH")]
    assert {"--signal=B:USR1@300", "--requeue", "--open-mode=append"} <= set(header)


def test_starts_that_slurm_took_away_count_as_restarts_and_those_asked_to_leave_do_not(cluster: Path) -> None:
    """A job that brings down its node each time would come back for ever."""
    folder = cluster / "qwen_lora-1234567"
    for number in range(1, 6):
        (folder / f"start-{number}").mkdir(parents=True)
    rows = "".join(f"{number} 85 - 9s 2026-11-28T00:00:00Z asked\n" for number in range(1, 5))
    (folder / "history").write_text(rows)
    variables = {"SLURM_RESTART_COUNT": "1", "RESTARTS": "1"}
    assert run_script(cluster, **variables).returncode == 0
    assert (folder / "history").read_text().splitlines()[4].startswith("5 gone - - ")
    (folder / "history").write_text(rows + "5 gone - - x\n")
    given_up = run_script(cluster, **variables)
    assert given_up.returncode == 75 and "given up after 1 restarts without progress" in given_up.stdout


@pytest.mark.parametrize(("python", "message"), [("/no/such/python -u", "can't be run"), ("LACKING", "lacks torch")])
def test_an_interpreter_that_will_not_do_is_said_once(cluster: Path, python: str, message: str) -> None:
    lacking = cluster / "lacking"
    lacking.write_text(f'#!/bin/sh\nexec {sys.executable} -I -S "$@"\n')
    lacking.chmod(0o755)
    done = run_script(cluster, PYTHON=python.replace("LACKING", str(lacking)))
    assert (done.returncode, done.stderr.count(message), done.stderr.count("error:")) == (2, 1, 1), done.stderr
    assert not (cluster / "tasks.jsonl").exists()


def test_an_interpreter_that_a_container_holds_is_left_to_the_tasks(cluster: Path) -> None:
    done = run_script(cluster, PYTHON="/in/the/image/python", QWEN_LORA_SRUN_FLAGS="--container-image=x")
    assert "--container-image=x" in (cluster / "srun_arguments").read_text()
    assert done.returncode == 2 and done.stdout.splitlines()[-1].startswith("error: rank 0 on node ")
    assert "can't run /in/the/image/python" in done.stdout.splitlines()[-1]
