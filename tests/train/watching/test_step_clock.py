"""seconds_per_step of each row is its own steps' time, whoever runs ahead of whom and whatever is written in between."""

import itertools
import json

import pytest
import torch

from train.watching.metrics import Metrics, WandbOptions
from train.watching.step_clock import GpuClock, HostClock

STEP = 1.0  # seconds of a step's work
LAUNCH = 0.01  # that the host needs to launch it


class FakeMachine:
    """A host that launches and a device that works, both on made-up seconds; it is the clock of the device's stream."""

    def __init__(self) -> None:
        self.host = self.device = 100.0

    def launch(self, seconds: float) -> None:
        self.host += LAUNCH
        self.device = max(self.device, self.host) + seconds

    def wait(self) -> None:
        self.host = max(self.host, self.device)

    def write(self, seconds: float) -> None:
        """On the host; the device is idle."""
        self.wait()
        self.host += seconds

    def mark(self) -> object:
        return max(self.device, self.host)

    def seconds(self, earlier: object, later: object) -> float:
        assert isinstance(earlier, float) and isinstance(later, float)
        return later - earlier


def speeds(path) -> dict[int, float]:
    rows = [json.loads(line) for line in (path / "metrics.jsonl").read_text().splitlines()]
    return {row["step"]: row["seconds_per_step"] for row in rows if "seconds_per_step" in row}


@pytest.mark.parametrize("log_steps,save_steps", [(1, 4), (2, 4), (2, 3), (3, 2), (1, 1), (4, 0)])
@pytest.mark.parametrize("validates", [False, True])
def test_every_row_has_its_own_steps_time(tmp_path, log_steps, save_steps, validates):
    """The host runs ahead except where something is written: rows are read a step late, or at once."""
    machine, steps = FakeMachine(), 12
    wandb = WandbOptions("disabled", "p", "n", {})
    metrics = Metrics(tmp_path, wandb, steps, samples_per_step=8, clock=machine)
    for step in range(1, steps + 1):
        machine.launch(STEP * (1 + (step > 6)))  # the second half takes twice as long
        metrics.advance()
        if step % log_steps == 0:
            metrics.log(step, loss=1.0)
        if save_steps and (step % save_steps == 0 or step == steps):
            metrics.flush()
            if validates:
                with metrics.paused():
                    machine.launch(7.0)
                    machine.wait()
                    metrics.record(step, validation_loss=1.0)
            with metrics.paused():
                machine.write(30.0)
    metrics.close()
    for step, seconds in speeds(tmp_path).items():
        own = range(step - log_steps + 1, step + 1)
        expected = sum(STEP * (1 + (s > 6)) for s in own) / log_steps
        assert seconds == pytest.approx(expected, abs=2 * LAUNCH), f"step {step}"


def test_the_host_clock_counts_to_the_row_and_not_to_its_writing(tmp_path, monkeypatch):
    """On a CPU the numbers are there at once, but the row is written with the next step: that one's time is not its own."""
    now = 100.0
    monkeypatch.setattr("train.watching.step_clock.time.perf_counter", lambda: now)
    metrics = Metrics(tmp_path, WandbOptions("disabled", "p", "n", {}), 4, samples_per_step=1, clock=HostClock())
    for step, seconds in enumerate((1.0, 5.0, 2.0, 4.0), start=1):
        now += seconds
        metrics.advance()
        metrics.log(step, loss=0.0)
        if step == 2:
            metrics.flush()
            with metrics.paused():
                now += 60.0
    metrics.close()
    assert list(speeds(tmp_path).values()) == [1.0, 5.0, 2.0, 4.0]


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_the_gpu_clock_counts_the_gpus_time():
    clock = GpuClock()
    torch.cuda._sleep(1)
    torch.cuda.synchronize()
    marks = [clock.mark()]
    for cycles in (100_000_000, 400_000_000):
        torch.cuda._sleep(cycles)
        marks.append(clock.mark())
    first, second = (clock.seconds(a, b) for a, b in itertools.pairwise(marks))
    assert 3 < second / first < 5
