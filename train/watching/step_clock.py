"""What optimizer steps took, on the clock of whoever does them.

The host only launches a GPU's work, and runs ahead of it by up to a step; where something is written it waits, and catches up.
Its own clock therefore gives a row's steps too little time, and the next row's too much. So marks are laid into the GPU's
stream instead, and read when it has passed them. Marks within steps tell data, forward, backward and optimizer apart; the GPU's
wait for the host's data lies before the mark `data`.
"""

import time
from itertools import pairwise
from typing import Protocol

import torch


class StepClock(Protocol):
    """Marks a moment in the order of the work; `seconds` may be asked once the work before `later` is done."""

    def mark(self) -> object: ...

    def seconds(self, earlier: object, later: object) -> float: ...


class HostClock:
    """The host does the work itself."""

    def mark(self) -> object:
        return time.perf_counter()

    def seconds(self, earlier: object, later: object) -> float:
        assert isinstance(earlier, float) and isinstance(later, float)
        return later - earlier


class GpuClock:
    """CUDA events in the current stream."""

    def mark(self) -> object:
        event = torch.cuda.Event(enable_timing=True, blocking=True)
        event.record()
        return event

    def seconds(self, earlier: object, later: object) -> float:
        assert isinstance(earlier, torch.cuda.Event) and isinstance(later, torch.cuda.Event)
        later.synchronize()
        return earlier.elapsed_time(later) / 1e3


PARTS = ("data", "forward", "backward", "optimizer")
TIMED = 10  # steps of a row, evenly spread
Marks = list[tuple[str, object]]


class TimeSplit:
    """Marks within optimizer steps. `clock` None: this rank measures nothing. `row_steps`: from one row to the next."""

    def __init__(self, clock: StepClock | None, row_steps: int = TIMED) -> None:
        self.clock, self.every = clock, max(1, row_steps // TIMED)
        self._step = 0
        self._marks: Marks | None = None
        self._taken: list[Marks] = []

    def begin(self) -> None:
        """An optimizer step begins."""
        self._marks = None
        if self.clock is not None and self._step % self.every == 0 and len(self._taken) < 2 * TIMED:
            self._marks = [("", self.clock.mark())]
            self._taken.append(self._marks)
        self._step += 1

    def reached(self, part: str) -> None:
        """What was launched since the last mark belongs to `part`."""
        if self._marks is not None and self.clock is not None:
            self._marks.append((part, self.clock.mark()))

    def take(self) -> list[Marks]:
        """All marks so far, for `seconds_of` when their work is done; begins anew."""
        taken, self._taken = self._taken, []
        return taken


def seconds_of(clock: StepClock, taken: list[Marks], step_seconds: float) -> dict[str, float]:
    """`seconds/data` …, the means of the steps that were timed; `seconds/other` is what `step_seconds` has besides."""
    if not taken:
        return {}
    sums = dict.fromkeys(PARTS, 0.0)
    for marks in taken:
        for (_, earlier), (part, later) in pairwise(marks):
            sums[part] += clock.seconds(earlier, later)
    means = {f"seconds/{part}": total / len(taken) for part, total in sums.items()}
    return means | {"seconds/other": max(step_seconds - sum(means.values()), 0.0)}
