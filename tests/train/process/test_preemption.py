"""Signals: all ranks leave at the same step with exit code 85 or 130; a second signal exits at once."""

import os
import signal
import time
from pathlib import Path

import pytest

from tests.helpers.forked_ranks import run_ranks


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
