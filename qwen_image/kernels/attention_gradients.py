"""Shapes and gradients of an attention operator that also returns its log-sum-exp, as the compiler and autograd want them.

For operators of query, key and value [B, H, L, D] with the memory of [B, L, H, D], and a fourth argument without gradient,
that return the output [B, Lq, H, D] and the log-sum-exp [B, H, Lq]; their backward operators take the output's gradient and
all of these, and return the gradients of query, key and value, [B, L, H, D].
"""

from collections.abc import Callable
from typing import Any

import torch


def register(forward: Any, backward: Callable[..., tuple[torch.Tensor, ...]]) -> None:
    """Tell of two custom operators (torch.library.custom_op) what the compiler and autograd need to know."""

    @forward.register_fake
    def _(query: torch.Tensor, *_: Any) -> tuple[torch.Tensor, torch.Tensor]:
        lse_dtype = torch.float64 if query.dtype == torch.float64 else torch.float32
        return query.new_empty(query.transpose(1, 2).shape), query.new_empty(query.shape[:3], dtype=lse_dtype)

    @backward.register_fake  # type: ignore[attr-defined]
    def _(
        _grad: torch.Tensor, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, *_: Any
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        rows, columns = query.transpose(1, 2).shape, key.transpose(1, 2).shape
        return query.new_empty(rows), key.new_empty(columns), value.new_empty(columns)

    def save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Any, ...]) -> None:
        query, key, value, _ = inputs
        ctx.save_for_backward(query, key, value, *output)
        ctx.mark_non_differentiable(output[1])

    def gradients(ctx: Any, grad: torch.Tensor, *_: Any) -> tuple[torch.Tensor | None, ...]:
        grads = backward(grad.contiguous(), *ctx.saved_tensors)
        return (*(each.transpose(1, 2) for each in grads), None)

    forward.register_autograd(gradients, setup_context=save)
