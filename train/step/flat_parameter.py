"""All trained matrices as one parameter: what DeepSpeed's ZeRO-2 sees of a LoRA.

A LoRA on q, k and v of both streams has 720 matrices, and DeepSpeed does a hook, a copy and a share of bookkeeping for
each, a tenth of a step in all. Here the matrices are views of one flat parameter; autograd fills their
gradients as ever, and DeepSpeed handles a single tensor. So under every stage.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import nn


def flatten(matrices: Sequence[nn.Parameter]) -> nn.Parameter:
    """One parameter with the values of all, in their order. Raises ValueError unless they share dtype and device."""
    kinds = {(matrix.dtype, matrix.device) for matrix in matrices}
    if len(kinds) != 1:
        raise ValueError(f"trained weights must share one dtype and device, these are {sorted(map(str, kinds))}")
    return nn.Parameter(torch.cat([matrix.detach().reshape(-1) for matrix in matrices]))


def link(matrices: Sequence[nn.Parameter], flat: nn.Parameter) -> None:
    """Make the matrices views of `flat`, wherever it lies now: DeepSpeed moves it into its own buffer once, at the start."""
    parts = flat.data.split([matrix.numel() for matrix in matrices])
    for matrix, part in zip(matrices, parts, strict=True):
        matrix.data = part.view(matrix.shape)


class FlatGradient(torch.autograd.Function):
    """losses = compute(), whose gradient with respect to `matrices` arrives as one tensor at `flat`."""

    @staticmethod
    def forward(
        ctx: Any, compute: Callable[[], torch.Tensor], matrices: Sequence[nn.Parameter], flat: torch.Tensor
    ) -> torch.Tensor:
        with torch.enable_grad():
            ctx.losses = compute()
        ctx.matrices = matrices
        return ctx.losses.detach()

    @staticmethod
    def backward(ctx: Any, *upstream: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        losses, ctx.losses = ctx.losses, None
        gradients = torch.autograd.grad(losses, ctx.matrices, upstream[0])
        return None, None, torch.cat([gradient.reshape(-1) for gradient in gradients])
