"""Signals: all ranks leave at the same step with exit code 85; a second signal exits at once."""

import os
import signal
import time
from pathlib import Path

import pytest

from tests.helpers.forked_ranks import run_ranks


def leave_on_signal(root: Path) -> None:
    import torch.distributed as dist

    from train.process.exit_codes import PREEMPTED
    from train.process.preemption import Preemption

    preemption, rank = Preemption(), dist.get_rank()
    for step in range(10_000):
        dist.barrier()
        if step == 5:
            (root / f"ready-{rank}").touch()
        if preemption.agreed():
            (root / f"left-{rank}").write_text(str(step))
            os._exit(PREEMPTED)
        time.sleep(0.001)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1])
def test_a_signal_to_one_rank_makes_all_leave_at_the_same_step(tmp_path, number):
    ranks = run_ranks(2, leave_on_signal, tmp_path, wait=False)
    while not (tmp_path / "ready-1").exists():
        time.sleep(0.005)
    os.kill(ranks[1].pid, number)
    for rank in ranks:
        rank.join(30)
    assert [rank.exitcode for rank in ranks] == [85, 85]
    assert (tmp_path / "left-0").read_text() == (tmp_path / "left-1").read_text()


def sleep_after_the_first_signal(root: Path, echo_seconds: float) -> None:
    from train.process import preemption as module

    module.ECHO_SECONDS = echo_seconds
    preemption = module.Preemption()
    (root / "ready").touch()
    while True:
        time.sleep(0.01)
        if preemption.signal:
            (root / "seen").touch()


def test_a_second_signal_exits_at_once(tmp_path):
    (process,) = run_ranks(1, sleep_after_the_first_signal, tmp_path, 0.0, wait=False)
    for name in ("ready", "seen"):
        while not (tmp_path / name).exists():
            time.sleep(0.005)
        os.kill(process.pid, signal.SIGTERM)
    process.join(10)
    assert process.exitcode == 128 + signal.SIGTERM


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
