"""The learning rate as a pure function of the optimizer step: warm-up, then constant, cosine or linear."""

import math
from dataclasses import dataclass
from typing import Any, Literal

from train.config.train_config import TrainConfig


@dataclass(frozen=True)
class LearningRate:
    """`--lr_scheduler`: linear warm-up to `peak` over `warmup_steps`, then constant, or down to 0 at `total_steps`.

    A pure function of the step, so that resuming needs no scheduler state.
    """

    peak: float
    course: Literal["constant", "cosine", "linear"]
    warmup_steps: int
    total_steps: int

    @classmethod
    def from_config(cls, config: TrainConfig, total_steps: int) -> "LearningRate":
        return cls(config.learning_rate, config.lr_scheduler, config.lr_warmup_steps, total_steps)

    def at(self, step: int) -> float:
        """Of optimizer step `step`, counted from 0."""
        if step < self.warmup_steps:
            return self.peak * (step + 1) / self.warmup_steps
        if self.course == "constant":
            return self.peak
        done = (step - self.warmup_steps) / max(1, self.total_steps - self.warmup_steps)
        remaining = 1 - done if self.course == "linear" else 0.5 * (1 + math.cos(math.pi * done))
        return self.peak * max(0.0, remaining)

    def set(self, engine: Any, step: int) -> None:
        """Give the engine's optimizer the learning rate of optimizer step `step`."""
        for group in engine.optimizer.param_groups:
            group["lr"] = self.at(step)
