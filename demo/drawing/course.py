"""How long something learns: for some seconds or some steps; the learning rate warms up, then falls to 0 by a cosine."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator
from dataclasses import dataclass, field


@dataclass
class Course:
    """A course of learning. `steps`, where given, ends it; else `seconds` do, and at least one step is done."""

    name: str
    seconds: float
    steps: int | None = None
    warm_up: int = 100
    every: int = 100  # steps between two lines
    start: float = field(default_factory=time.perf_counter)
    done: int = 0

    def share(self) -> float:
        """How much of the course is over, 0 … 1."""
        if self.steps is not None:
            return min(1.0, self.done / self.steps)
        return min(1.0, (time.perf_counter() - self.start) / self.seconds) if self.seconds > 0 else 1.0

    def rates(self, peak: float) -> Iterator[float]:
        """The learning rate of one step after the other."""
        while not self.done or self.share() < 1:
            yield peak * min((self.done + 1) / self.warm_up, 0.5 + 0.5 * math.cos(math.pi * self.share()))
            self.done += 1

    def is_due(self) -> bool:
        """Whether a line should be printed after this step."""
        return self.done % self.every == 0

    def tell(self, **numbers: float) -> None:
        seconds = time.perf_counter() - self.start
        told = "  ".join(f"{name} {value:.4f}" for name, value in numbers.items())
        print(
            f"{self.name}: step {self.done}  {told}  {seconds / (self.done + 1):.4f} s/step  {self.share():.0%}",
            flush=True,
        )
