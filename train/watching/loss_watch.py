"""The loss between two rows of metrics, and steps that are no longer finite: were they taken, and if not, who spoiled them.

A step whose gradient's norm is infinite or NaN is left out, so the weights stay sound (train/engine/zero2_step.py,
DeepSpeed's own step elsewhere). Neither tells which samples did it. The host reads a step's verdict when it has launched
the next one, so that it never waits for the device; before anything is written or told, it reads all.
"""

from collections import deque
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.distributed as dist

from train.data.batch import Batch
from train.engine.optimizer import applied_rate
from train.engine.zero2_step import step_applied

IN_A_ROW, WINDOW, SHARE = 5, 40, 0.25


class Seen(NamedTuple):
    """A micro-batch: its samples' keys and σ, and their losses [B] on the device."""

    keys: list[str]
    sigma: torch.Tensor
    losses: torch.Tensor


class Verdict(NamedTuple):
    """Whether an optimizer step was taken: `applied` is right on the host once `arrived` has happened (None: it is)."""

    step: int
    seen: list[Seen]
    learning_rate: float
    norm: torch.Tensor | float | None  # of the gradient, on the device
    applied: torch.Tensor
    arrived: torch.cuda.Event | None


class LossWatch:
    """Remembers the micro-batches of optimizer steps until they are judged, and adds up the losses of those taken.

    Args:
        state: `state()` of the run that is resumed, so that the next row averages over the same steps as if nothing had
            happened.

    Attributes:
        skipped: steps left out so far, as far as they were judged.
        spoiled: for people: the last step left out, and why.
    """

    def __init__(self, say: Callable[[str], None], device: torch.device, state: dict[str, Any] | None = None) -> None:
        self.say = say
        self.skipped, self.spoiled = 0, ""
        self._latest: deque[bool] = deque(maxlen=WINDOW)  # of the last steps: was each left out?
        self._seen: list[Seen] = []
        self._verdicts: deque[Verdict] = deque()
        self._steps = torch.zeros((), device=device, dtype=torch.int64)
        self._sum = torch.zeros((), device=device)
        if state:
            self._steps += state["steps"]
            sums, world = state["sums"], dist.get_world_size()
            self._sum += sums[dist.get_rank()] if len(sums) == world else sum(sums) / len(sums)

    def saw(self, batch: Batch, losses: torch.Tensor) -> None:
        """Keep a micro-batch's names with its losses [B], on the device."""
        self._seen.append(Seen(batch.keys, batch.sigma, losses.detach()))

    def stepped(self, step: int, engine: Any) -> torch.Tensor:
        """Optimizer step `step` was launched with what was seen since the last one. Waits for nothing.

        Returns whether it was taken, a bool on the device.
        """
        seen, self._seen = self._seen, []
        applied = torch.as_tensor(step_applied(engine), device=self._sum.device)
        mean = torch.stack([each.losses.mean() for each in seen]).sum() / len(seen)
        self._sum += torch.where(applied, mean, 0.0)  # not a product: the mean of a step left out may be NaN
        self._steps += applied
        arrived, on_device = None, applied
        if applied.is_cuda:
            applied = torch.empty((), dtype=torch.bool, pin_memory=True).copy_(applied, non_blocking=True)
            arrived = torch.cuda.Event(blocking=True)
            arrived.record()
        norm = engine.get_global_grad_norm()
        norm = norm.detach().clone() if isinstance(norm, torch.Tensor) else norm
        self._verdicts.append(Verdict(step, seen, applied_rate(engine), norm, applied, arrived))
        return on_device

    def took(self, all_steps: bool) -> bool:
        """Judge the steps launched, but for the last one unless `all_steps`; if one was left out, say which samples spoiled it.

        Returns whether all of them were taken: the same on all ranks, which must call it alike.
        """
        taken = True
        while len(self._verdicts) > (0 if all_steps else 1):
            verdict = self._verdicts.popleft()
            if verdict.arrived is not None:
                verdict.arrived.synchronize()
            self._latest.append(not verdict.applied)
            if not verdict.applied:
                taken = False
                self.skipped += 1
                self._tell(verdict)
        return taken

    @property
    def gave_up(self) -> bool:
        """So many steps were left out that what comes of the run is no training: IN_A_ROW, or SHARE of the last WINDOW."""
        latest = list(self._latest)
        return (len(latest) >= IN_A_ROW and all(latest[-IN_A_ROW:])) or sum(latest) > SHARE * WINDOW

    def _tell(self, verdict: Verdict) -> None:
        """Name the samples of all ranks whose loss isn't finite. A collective."""
        here = [
            f"{key} at σ {sigma:g} (loss {loss:g})"
            for seen in verdict.seen
            for key, sigma, loss in zip(seen.keys, seen.sigma.tolist(), seen.losses.tolist(), strict=True)
            if not torch.isfinite(torch.tensor(loss))
        ]
        everywhere: list[Any] = [None] * dist.get_world_size()
        dist.all_gather_object(everywhere, here)
        culprits = [name for names in everywhere for name in names]
        cause = f"samples {', '.join(culprits)}" if culprits else "the gradient overflowed, all losses are finite"
        norm = "unknown" if verdict.norm is None else f"{float(verdict.norm):.3g}"
        rate = f"learning rate {verdict.learning_rate:.3g}, gradient norm {norm}"
        self.spoiled = f"step {verdict.step} is not finite and was left out ({self.skipped} so far): {cause}; {rate}"
        self.say(self.spoiled)

    def mean(self) -> torch.Tensor:
        """Mean loss of the steps taken since the last call, over all ranks; NaN if none was. On the device; a collective."""
        total = self._sum.double() / self._steps  # 0 / 0 is NaN
        dist.all_reduce(total)
        self._sum, self._steps = torch.zeros_like(self._sum), torch.zeros_like(self._steps)
        return total / dist.get_world_size()

    def state(self) -> dict[str, Any]:
        """What was added up since the last row, for a checkpoint. A collective."""
        sums: list[Any] = [None] * dist.get_world_size()
        dist.all_gather_object(sums, self._sum.item())
        return {"steps": int(self._steps.item()), "sums": sums}
