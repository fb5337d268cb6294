"""Losses and gradients that are no longer finite: was the step taken, and if not, who spoiled it.

DeepSpeed leaves a step out when the gradient's norm is infinite or NaN (it reads the norm for clipping anyway), so the
weights stay sound and looking costs nothing. What it doesn't tell is which samples did it.
"""

from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist

from train.data import Batch


class LossWatch:
    """Remembers the micro-batches of the current optimizer step and judges the step.

    Attributes:
        skipped: steps left out so far.
    """

    def __init__(self, say: Callable[[str], None]) -> None:
        self.say = say
        self.skipped = 0
        self._seen: list[tuple[Batch, torch.Tensor]] = []

    def saw(self, batch: Batch, losses: torch.Tensor) -> None:
        """Keep a micro-batch's names with its losses [B], on the device."""
        self._seen.append((batch, losses.detach()))

    def took(self, step: int, engine: Any) -> bool:
        """Whether optimizer step `step` was taken, on all ranks alike; if not, it says which samples spoiled it."""
        seen, self._seen = self._seen, []
        if engine.was_step_applied():
            return True
        self.skipped += 1
        here = [
            f"{key} at σ {sigma:g} (loss {loss:g})"
            for batch, losses in seen
            for key, sigma, loss in zip(batch.keys, batch.sigma.tolist(), losses.tolist(), strict=True)
            if not torch.isfinite(torch.tensor(loss))
        ]
        everywhere: list[Any] = [None] * dist.get_world_size()
        dist.all_gather_object(everywhere, here)
        culprits = [name for names in everywhere for name in names]
        cause = f"samples {', '.join(culprits)}" if culprits else "the gradient overflowed, all losses are finite"
        self.say(f"step {step} is not finite and was left out ({self.skipped} so far): {cause}")
        return False
