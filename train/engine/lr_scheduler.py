"""The learning rate as a pure function of the optimizer step: warm-up, then constant, cosine or linear."""

import math
from dataclasses import dataclass
from typing import Any, Literal

from train.config.train_config import TrainConfig

HIGHEST = 0.1  # AdamW's step is about the learning rate in every weight


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

    def warnings(self) -> list[str]:
        """For people: a rate at which AdamW moves every weight by more in a step than LoRA's weights are large."""
        if self.peak <= HIGHEST:
            return []
        return [
            f"warning: learning rate {self.peak:g} is far above AdamW's usual 1e-5 … 1e-3: LoRAs break at such rates"
        ]

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
