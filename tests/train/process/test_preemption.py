"""Signals: all ranks leave at the same step with exit code 85 or 130; a second signal exits at once."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from tests.helpers.forked_ranks import run_ranks
from tests.helpers.training_run import ROOT


def test_how_to_stop_is_said_for_a_terminal_and_for_a_job(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    from train.process.preemption import how_to_stop

    monkeypatch.delenv("QWEN_LORA_ATTEMPT", raising=False)
    monkeypatch.setenv("SLURM_JOB_ID", "23")  # an interactive job has a terminal
    assert how_to_stop() == "Ctrl-C saves and ends; the same command goes on"
    monkeypatch.setenv("QWEN_LORA_ATTEMPT", str(tmp_path))
    assert how_to_stop().startswith("scancel --signal=USR1 23 saves and puts the job back")


def leave_on_signal(root: Path) -> None:
    import torch.distributed as dist

    from train.process.preemption import Agreed, Preemption

    preemption, rank = Preemption(), dist.get_rank()
    preemption.begin()
    for step in range(10_000):
        dist.barrier()
        if step == 5:
            (root / f"ready-{rank}").touch()
        if (agreed := preemption.agreed()) >= Agreed.LEAVE:
            (root / f"left-{rank}").write_text(str(step))
            os._exit(agreed.exit_code)
        time.sleep(0.001)


@pytest.mark.parametrize(
    "number,code", [(signal.SIGTERM, 85), (signal.SIGUSR1, 85), (signal.SIGHUP, 85), (signal.SIGINT, 130)]
)
def test_a_signal_to_one_rank_makes_all_leave_at_the_same_step(tmp_path, number, code):
    ranks = run_ranks(2, leave_on_signal, tmp_path, wait=False)
    while not (tmp_path / "ready-1").exists():
        time.sleep(0.005)
    os.kill(ranks[1].pid, number)
    for rank in ranks:
        rank.join(30)
    assert [rank.exitcode for rank in ranks] == [code, code]
    assert (tmp_path / "left-0").read_text() == (tmp_path / "left-1").read_text()


def sleep_after_the_first_signal(root: Path, echo_seconds: float) -> None:
    from train.process import preemption as module

    module.ECHO_SECONDS = echo_seconds
    preemption = module.Preemption()
    preemption.begin()
    (root / "ready").touch()
    while True:
        time.sleep(0.01)
        if preemption.signal:
            (root / "seen").touch()


@pytest.mark.parametrize(
    "first,second", [(signal.SIGTERM, signal.SIGTERM), (signal.SIGINT, signal.SIGINT), (signal.SIGUSR1, signal.SIGINT)]
)
def test_a_second_signal_exits_at_once(tmp_path, first, second):
    (process,) = run_ranks(1, sleep_after_the_first_signal, tmp_path, 0.0, wait=False)
    for name, number in (("ready", first), ("seen", second)):
        while not (tmp_path / name).exists():
            time.sleep(0.005)
        os.kill(process.pid, number)
    process.join(10)
    assert process.exitcode == 128 + second


def data_that_stops(root: Path, starving: tuple[int, ...]) -> None:
    """A loop whose data stops after five batches, on the ranks `starving`."""
    import torch.distributed as dist

    from train.process import preemption as module

    module.GRACE_SECONDS = module.MEET_SECONDS = 0.6
    preemption, rank = module.Preemption(), dist.get_rank()
    preemption.begin()

    def batches():
        for number in range(10_000):
            if number == 5:
                (root / f"ready-{rank}").touch()
                if rank in starving:
                    time.sleep(3600)
            yield number

    stream, steps = batches(), 0
    try:
        while preemption.agreed() == module.Agreed.GO_ON:
            assert preemption.receive(stream) == steps
            dist.barrier()
            steps += 1
    except module.AskedToLeave as asked:
        if asked.together:
            dist.barrier()  # saving
        (root / f"left-{rank}").write_text(f"{steps} {asked.together} {asked.waits}")
        os._exit(asked.agreed.exit_code)


@pytest.mark.parametrize("number,code", [(signal.SIGTERM, 85), (signal.SIGINT, 130)])
@pytest.mark.parametrize("starving,told", [((0, 1), (0, 1)), ((1,), (0, 1)), ((1,), (1,)), ((0, 1), (1, 0))])
def test_ranks_that_wait_for_data_leave_together_between_steps(tmp_path, number, code, starving, told):
    """All of them starve, or one alone, for which the others wait; all are told, or the one that starves."""
    ranks = run_ranks(2, data_that_stops, tmp_path, starving, wait=False)
    while not all((tmp_path / f"ready-{rank}").exists() for rank in (0, 1)):
        time.sleep(0.005)
    for rank in told:
        os.kill(ranks[rank].pid, number)
    for process in ranks:
        process.join(30)
    assert [process.exitcode for process in ranks] == [code, code]
    assert [(tmp_path / f"left-{rank}").read_text() for rank in (0, 1)] == ["5 True False"] * 2


def test_a_rank_that_others_let_wait_says_so(tmp_path):
    """Rank 1 starves and isn't told to leave; rank 0 is, and can't save alone."""
    ranks = run_ranks(2, data_that_stops, tmp_path, (1,), wait=False)
    while not all((tmp_path / f"ready-{rank}").exists() for rank in (0, 1)):
        time.sleep(0.005)
    os.kill(ranks[0].pid, signal.SIGTERM)
    ranks[0].join(30)
    ranks[1].kill()
    ranks[1].join()
    assert ranks[0].exitcode == 85 and (tmp_path / "left-0").read_text() == "5 False True"


def test_deepspeeds_sigterm_after_ctrl_c_is_no_second_one(tmp_path):
    """Its launcher translates what the terminal has sent to all."""
    (process,) = run_ranks(1, sleep_after_the_first_signal, tmp_path, 0.0, wait=False)
    for name, number in (("ready", signal.SIGINT), ("seen", signal.SIGTERM)):
        while not (tmp_path / name).exists():
            time.sleep(0.005)
        os.kill(process.pid, number)
    process.join(0.5)
    assert process.is_alive()
    process.kill()
    process.join()


def test_what_a_launcher_passes_on_is_no_second_signal(tmp_path):
    (process,) = run_ranks(1, sleep_after_the_first_signal, tmp_path, 60.0, wait=False)
    for name in ("ready", "seen", "seen"):
        while not (tmp_path / name).exists():
            time.sleep(0.005)
        os.kill(process.pid, signal.SIGTERM)
    process.join(0.3)
    assert process.is_alive()
    process.kill()
    process.join()


LAUNCHED = """
import os, sys, time
from pathlib import Path
from train.process.launchers import LAUNCHERS
root, launcher, early = Path(sys.argv[1]), os.getppid(), sys.argv[2] == "early"
if not early:
    LAUNCHERS.gone = lambda launcher: None          # as if the thread had not come to it yet
LAUNCHERS.begin()                                   # train_lora.py's first line
(root / "began").touch()
while os.getppid() == launcher or early:            # imports, weights …
    time.sleep(0.01)
from train.process import preemption
try:
    waiting = preemption.Preemption()
    waiting._launcher_gone(LAUNCHERS.ended())
    time.sleep(20)
except preemption.AskedToLeave as asked:
    sys.stderr.write(f"asked: {asked}\\n")
"""


@pytest.mark.parametrize("moment", ["early", "late"])
def test_a_launcher_that_is_killed_during_the_imports_is_missed_all_the_same(tmp_path, moment):
    """Its ranks end within seconds; later the tree of processes tells nothing of it, and they would train on unseen."""
    (tmp_path / "torchrun").write_text(
        "import subprocess, sys; subprocess.run([sys.executable, '-c', *sys.argv[1:]], stderr=open('said', 'w'))"
    )
    command = [sys.executable, str(tmp_path / "torchrun"), LAUNCHED, str(tmp_path), moment]
    launcher = subprocess.Popen(command, env=os.environ | {"PYTHONPATH": str(ROOT)}, cwd=tmp_path)
    while not (tmp_path / "began").exists():
        time.sleep(0.01)
    (rank,) = psutil.Process(launcher.pid).children()
    launcher.kill()
    launcher.wait()
    psutil.wait_procs([rank], timeout=60)
    ending = {"early": ": ended before the first step, nothing to save", "late": ""}[moment]
    said = (tmp_path / "said").read_text().splitlines()[-1].partition(": ")[2]
    assert said == f"the launcher (process {launcher.pid}) has ended{ending}"
