"""What optimizer steps took, on the clock of whoever does them.

The host only launches a GPU's work, and runs ahead of it by up to a step; where something is written it waits, and catches up.
Its own clock therefore gives a row's steps too little time, and the next row's too much. So marks are laid into the GPU's
stream instead, and read when it has passed them.
"""

import time
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
