"""The learning rate as a pure function of the optimizer step: warm-up, then constant, cosine or linear."""

import math
from typing import Any

from train.config.train_config import TrainConfig


def learning_rate(step: int, config: TrainConfig, total_steps: int) -> float:
    """Learning rate of optimizer step `step` (from 0): linear warm-up, then constant, cosine or linear to 0.

    A pure function of the step, so that resuming needs no scheduler state.
    """
    if step < config.lr_warmup_steps:
        return config.learning_rate * (step + 1) / config.lr_warmup_steps
    if config.lr_scheduler == "constant":
        return config.learning_rate
    done = (step - config.lr_warmup_steps) / max(1, total_steps - config.lr_warmup_steps)
    remaining = 1 - done if config.lr_scheduler == "linear" else 0.5 * (1 + math.cos(math.pi * done))
    return config.learning_rate * max(0.0, remaining)


def set_learning_rate(engine: Any, learning_rate: float) -> None:
    for group in engine.optimizer.param_groups:
        group["lr"] = learning_rate
