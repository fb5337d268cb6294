"""`--ema_decay`: an exponential moving average (EMA) of the LoRA's float32 weights, kept beside them.

    w̄ ← w̄ + (1 − d) · (w − w̄)   after each optimizer step t that was taken, with d = min(decay, (1 + t) / (10 + t))

The average of a noisy path is nearer to its middle than its last point is (Polyak and Juditsky 1992). The growing d is
diffusers' `EMAModel`'s with its warm-up: without it the average of a short run would still be what it began with.

Each rank averages the part of the weights whose masters it holds, element by element by three operations that round for
themselves, so that where a rank's part begins and ends changes no bit.
"""

from collections.abc import Sequence

import torch

EMA = "ema"  # the kind of tensor in checkpoints (train/engine/optimizer_state.py)


class Ema:
    """Averages of this rank's flat float32 buffers; they begin as these are.

    Attributes:
        averages: by buffer, laid out as it is.
    """

    def __init__(self, masters: Sequence[torch.Tensor], decay: float) -> None:
        self.decay = decay
        self.averages = {master: master.detach().clone() for master in masters}

    def begin(self) -> None:
        """Begin anew, at the weights as they are."""
        for master, average in self.averages.items():
            average.copy_(master.detach())

    def decay_at(self, step: int) -> float:
        """Of optimizer step `step`, counted from 1."""
        return min(self.decay, (1 + step) / (10 + step))

    @torch.no_grad()
    def update(self, step: int, applied: torch.Tensor | bool) -> None:
        """Take in the weights after optimizer step `step`, if it was `applied`; that may yet be on the device. No waiting."""
        if applied is False:
            return
        averages, share = list(self.averages.values()), 1 - self.decay_at(step)
        weight: torch.Tensor | float = share
        if isinstance(applied, torch.Tensor):
            if applied.device != averages[0].device:  # the optimizer works on the CPU, which has waited for the step
                applied = applied.to(averages[0].device)
            weight = torch.where(applied, share, 0.0).float()
        difference = torch._foreach_sub([master.detach() for master in self.averages], averages)
        torch._foreach_mul_(difference, weight)
        torch._foreach_add_(averages, difference)
