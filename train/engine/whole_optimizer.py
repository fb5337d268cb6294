"""Optimizers that need the LoRA's matrices, or sums over all of them: whole on every rank, inside ZeRO-2's engine.

DeepSpeed's ZeRO-2 gives an optimizer a piece of one flat vector. Muon refuses a vector, Adafactor's numbers change on it,
Prodigy would sum over its own piece, LoRA+ has two rates within it. A LoRA is small, so here ZeRO keeps what it does well
(accumulation, the mean of gradients over ranks, their norm, clipping, leaving out a step that is not finite, offload, the
model's own weights) and its optimizer is this one: a step gathers the pieces of the clipped gradient, lets the real optimizer
step float32 masters of all matrices, the same on every rank, and hands ZeRO this rank's piece of them.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from train.engine.optimizer import Optimizer


class WholeOptimizer(torch.optim.Optimizer):
    """What ZeRO-2 takes for the optimizer of its one flat parameter.

    Args:
        flat: the parameter, before ZeRO divides it.
        shapes: of the matrices in it, by name, in their order.
        on_cpu: ZeRO offloads it: masters, state and arithmetic are the CPU's.

    Attributes:
        masters: float32 [total], of which `matrices` are views.
        inner: the real optimizers.
    """

    def __init__(
        self, flat: nn.Parameter, shapes: Mapping[str, torch.Size], optimizer: Optimizer, on_cpu: bool = False
    ) -> None:
        self.name, self.device = optimizer.name, flat.device
        self.masters = nn.Parameter(flat.detach().to("cpu" if on_cpu else flat.device, torch.float32, copy=True))
        self.shapes = dict(shapes)
        parts = zip(self.shapes.items(), self.split(self.masters.detach()), strict=True)
        self.matrices = {name: nn.Parameter(part.view(shape)) for (name, shape), part in parts}
        self.inner = optimizer.build_whole(self.matrices, self.masters)
        fused = all(each.defaults.get("fused") for each in self.inner)
        super().__init__([flat], {"lr": optimizer.learning_rate, "fused": fused})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        """Take ZeRO's piece of the gradient, [F], and leave its piece of the masters stepped; a collective."""
        (piece,) = self.param_groups[0]["params"]
        gradient = self.gather(piece.grad)
        self.masters.grad = gradient
        for matrix, part in zip(self.matrices.values(), self.split(gradient), strict=True):
            matrix.grad = part.view(matrix.shape)
        for optimizer in self.inner:
            for group in optimizer.param_groups:
                group["lr"] = self.param_groups[0]["lr"] * group["times"]
            if hasattr(self, "found_inf"):  # train/engine/zero2_step.py: a fused AdamW judges on the device
                optimizer.found_inf = self.found_inf  # type: ignore[attr-defined]
            optimizer.step()
        if self.name == "prodigy":
            self.param_groups[0]["d"] = self.inner[0].param_groups[0]["d"]
        for parameter in (self.masters, *self.matrices.values()):
            parameter.grad = None
        self.hand_over()

    def gather(self, piece: torch.Tensor) -> torch.Tensor:
        """All ranks' pieces as one vector where the masters are, without what pads the last."""
        world = dist.get_world_size()
        whole = piece.to(self.device) if world > 1 else piece
        if world > 1:
            whole = torch.empty(world * len(piece), device=self.device, dtype=piece.dtype)
            dist.all_gather_into_tensor(whole, piece.to(self.device))
        return whole[: len(self.masters)].to(self.masters.device)

    def hand_over(self) -> None:
        """Put this rank's piece of the masters where ZeRO takes it from."""
        (piece,) = self.param_groups[0]["params"]
        mine = self.masters.detach()[dist.get_rank() * len(piece) :][: len(piece)]
        piece.detach()[: len(mine)].copy_(mine)

    def split(self, flat: torch.Tensor) -> Sequence[torch.Tensor]:
        """A vector laid out as the masters are, matrix by matrix."""
        return flat.split([shape.numel() for shape in self.shapes.values()])

    def averages(self) -> torch.Tensor | None:
        """Schedule-free's x, float32 [total], from its y and z as its package's eval() has it; None for other optimizers.

        Training goes on at y, untouched: eval() and train() in place would round each time.
        """
        if self.name != "schedulefree":
            return None
        (optimizer,) = self.inner
        weight = 1 - 1 / optimizer.param_groups[0]["betas"][0]
        found = torch.empty_like(self.masters.detach())
        for matrix, part in zip(self.matrices.values(), self.split(found), strict=True):
            y = matrix.detach()
            torch.lerp(y, optimizer.state.get(matrix, {}).get("z", y), weight, out=part.view(matrix.shape))
        return found
