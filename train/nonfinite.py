"""The loss between two rows of metrics, and steps that are no longer finite: were they taken, and if not, who spoiled them.

DeepSpeed leaves a step out when the gradient's norm is infinite or NaN (it reads the norm for clipping anyway), so the
weights stay sound and looking costs nothing. What it doesn't tell is which samples did it.
"""

from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist

from train.data import Batch


class LossWatch:
    """Remembers the micro-batches of the current optimizer step, judges the step, and adds up the losses of those taken.

    Args:
        state: `state()` of the run that is resumed, so that the next row averages over the same steps as if nothing had
            happened.

    Attributes:
        skipped: steps left out so far.
    """

    def __init__(self, say: Callable[[str], None], device: torch.device, state: dict[str, Any] | None = None) -> None:
        self.say = say
        self.skipped = 0
        self._seen: list[tuple[Batch, torch.Tensor]] = []
        self._steps: int = state["steps"] if state else 0
        self._sum = torch.zeros((), device=device)
        if state:
            sums, world = state["sums"], dist.get_world_size()
            self._sum += sums[dist.get_rank()] if len(sums) == world else sum(sums) / len(sums)

    def saw(self, batch: Batch, losses: torch.Tensor) -> None:
        """Keep a micro-batch's names with its losses [B], on the device."""
        self._seen.append((batch, losses.detach()))

    def took(self, step: int, engine: Any) -> bool:
        """Whether optimizer step `step` was taken, on all ranks alike; if not, it says which samples spoiled it."""
        seen, self._seen = self._seen, []
        if engine.was_step_applied():
            self._sum += torch.stack([losses.mean() for _, losses in seen]).sum() / len(seen)
            self._steps += 1
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

    def mean(self) -> float:
        """Mean loss of the steps taken since the last call, over all ranks; NaN if none was. A collective."""
        total = self._sum.double() / self._steps  # 0 / 0 is NaN
        dist.all_reduce(total)
        self._sum, self._steps = torch.zeros_like(self._sum), 0
        return (total / dist.get_world_size()).item()

    def state(self) -> dict[str, Any]:
        """What was added up since the last row, for a checkpoint. A collective."""
        sums: list[Any] = [None] * dist.get_world_size()
        dist.all_gather_object(sums, self._sum.item())
        return {"steps": self._steps, "sums": sums}
