"""The learning rate as a pure function of the optimizer step: warm-up, then constant, or down by a cosine or a line."""

import math
from dataclasses import dataclass
from typing import Any, Literal

from train.config.train_config import TrainConfig


@dataclass(frozen=True)
class LearningRate:
    """`--lr_scheduler`: linear warm-up to `peak` over `warmup_steps`, then constant, or down to `lowest` at `total_steps`.

    cosine_with_restarts comes down `cycles` times, each time by a half cosine over an equal number of steps, and begins anew
    at the peak: SGDR's warm restarts (arXiv:1608.03983) with cycles of one length, as transformers' and diffusers' schedule of
    that name. A pure function of the step, so that resuming needs no scheduler state.
    """

    peak: float
    course: Literal["constant", "constant_with_warmup", "cosine", "cosine_with_restarts", "linear"]
    warmup_steps: int
    total_steps: int
    lowest: float = 0.0
    cycles: int = 1

    @classmethod
    def from_config(cls, config: TrainConfig, total_steps: int) -> "LearningRate":
        course = config.lr_scheduler, config.lr_warmup_steps, total_steps, config.lr_min, config.lr_num_cycles
        return cls(config.peak_learning_rate, *course)

    def at(self, step: int) -> float:
        """Of optimizer step `step`, counted from 0."""
        if step < self.warmup_steps:
            return self.peak * (step + 1) / self.warmup_steps
        if self.course in ("constant", "constant_with_warmup"):
            return self.peak
        since, span = step - self.warmup_steps, max(1, self.total_steps - self.warmup_steps)
        done = min(1.0, since / span)  # beyond the end a cosine would rise again
        if self.course == "cosine_with_restarts" and since < span:
            done = since * self.cycles % span / span  # in whole numbers: rounding would move a restart by a step
        remaining = 1 - done if self.course == "linear" else 0.5 * (1 + math.cos(math.pi * done))
        return self.lowest + (self.peak - self.lowest) * remaining

    def lines_on_resuming(self, step: int, before: dict[str, Any]) -> list[str]:
        """For people: what the schedule does from optimizer step `step` on, where that is not what the earlier run would
        have done. `before`: its client state in the checkpoint, with `config` and (not in old ones) `steps`.
        """
        options = before.get("config", {})
        steps = before.get("steps") or options.get("max_steps")
        if not step or not steps or step >= self.total_steps:  # no step is left: a finished run writes its LoRA again
            return []
        earlier = LearningRate(
            options.get("learning_rate", self.peak),
            options.get("lr_scheduler", self.course),
            options.get("lr_warmup_steps", self.warmup_steps),
            steps,
            options.get("lr_min", 0.0),
            options.get("lr_num_cycles", 1),
        )
        now, then = self.at(step), earlier.at(step - 1)
        if math.isclose(self.at(step - 1), then, rel_tol=1e-6, abs_tol=1e-6 * self.peak):
            return []
        return [
            f"learning rate: {now:.3g} from step {step + 1} on ({self.course}, {self.total_steps} steps); the earlier run "
            f"({earlier.course}, {earlier.total_steps} steps) was at {then:.3g} in step {step}"
        ]

    def set(self, engine: Any, step: int) -> None:
        """Give the engine's optimizer the learning rate of optimizer step `step`."""
        for group in engine.optimizer.param_groups:
            group["lr"] = self.at(step)
