"""The MLP of a frozen float8 base, gelu(x·Upᵀ + b)·Downᵀ + b, as one function with a gradient for x alone.

GELU stands between two float8 products, so its output is quantized as soon as it is computed; backwards so is gelu'(y)·g. A
row's scale is known only when its largest value is: the compiler writes what it has computed and reads it again, where one
Triton kernel (qwen_image/kernels/gelu_kernels.py) keeps a row in registers meanwhile. All that is kept for the backward pass
is y, the up projection's output; GELU is computed again from it.
"""

from importlib.util import find_spec
from typing import Any

import torch
import torch.nn.functional as F

from qwen_image.float8.scaled_rows import Float8Weight, quantize_rows

HAS_TRITON = find_spec("triton") is not None
if HAS_TRITON:
    from qwen_image.float8 import gelu_operators  # registers them


def has_kernel(x: torch.Tensor, width: int) -> bool:
    """Whether the kernels can do it for an MLP over x with so many hidden channels: a GPU, Triton, rows that fit."""
    return (
        HAS_TRITON
        and x.is_cuda
        and x.dtype in (torch.bfloat16, torch.float16, torch.float32)
        and 2 <= width <= gelu_operators.WIDEST
    )


def quantized_gelu(y: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """y [M, K] → quantize_rows(gelu(y)), computed in float32: float8 [M, K] and scales [M, 1]."""
    if has_kernel(y, y.shape[1]):
        values, scales = torch.ops.qwen_image.quantized_gelu(y.contiguous())
        return values, scales
    return quantize_rows(F.gelu(y.float(), approximate="tanh"))


def quantized_gelu_gradient(
    gradient: torch.Tensor, y: torch.Tensor, weight_scale: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """gelu(y)'s gradient and y [M, K], weight_scale [1, K] → quantize_rows(gradient · gelu'(y) · weight_scale)."""
    if has_kernel(y, y.shape[1]):
        values, scales = torch.ops.qwen_image.quantized_gelu_gradient(
            gradient.contiguous(), y.contiguous(), weight_scale
        )
        return values, scales
    return quantize_rows(torch.ops.aten.gelu_backward(gradient.float(), y.float(), approximate="tanh") * weight_scale)


class _MLP(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: torch.Tensor, up_bias: torch.Tensor, down_bias: torch.Tensor, *weights: Any
    ) -> torch.Tensor:
        up, down = Float8Weight(*weights[:4]), Float8Weight(*weights[4:])
        y = up.output(x.flatten(0, -2), up_bias)
        ctx.save_for_backward(y, *weights)
        return down.output_of_rows(*quantized_gelu(y), down_bias, x.dtype).unflatten(0, x.shape[:-1])

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> Any:
        (gradient,) = gradients
        y, *weights = ctx.saved_tensors
        up, down = Float8Weight(*weights[:4]), Float8Weight(*weights[4:])
        of_gelu = down.input_gradient(gradient.flatten(0, -2))
        of_x = up.input_gradient_of_rows(*quantized_gelu_gradient(of_gelu, y, up.scale), gradient.dtype)
        return of_x.unflatten(0, gradient.shape[:-1]), *[None] * 10


def float8_mlp(
    x: torch.Tensor, up: Float8Weight, up_bias: torch.Tensor, down: Float8Weight, down_bias: torch.Tensor
) -> torch.Tensor:
    """x [..., K] → gelu(x·Upᵀ + up_bias)·Downᵀ + down_bias [..., N] with a gradient for x alone."""
    return _MLP.apply(x, up_bias, down_bias, *up, *down)
