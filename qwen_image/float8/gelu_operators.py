"""GELU and its gradient with float8 quantization as operators on CUDA tensors; torch.compile sees through them.

Widest row, and warps, by compiling for an H100 at 12288 columns: 8 warps take 64 registers forward and 78 backward, so that
four and three programs share a multiprocessor; 16 need 32 KB of shared memory to fold the tiles. Nothing spills up to 16384.
"""

from typing import Any

import torch
from torch.library import triton_op, wrap_triton

from qwen_image.float8.scaled_rows import FLOAT8, LARGEST, SMALLEST_SCALE
from qwen_image.kernels.gelu_kernels import gelu_gradient_kernel, gelu_kernel

WARPS = 8
WIDEST = 16384


def tiles(width: int) -> dict[str, Any]:
    """The kernels' constants for rows of `width` ≥ 2: two powers of two that hold a row, with few lanes left over."""
    first = 1 << (width - 1).bit_length() - 1
    second = 1 << (width - first - 1).bit_length()
    return {"WIDTH": width, "FIRST": first, "SECOND": second, "LARGEST": LARGEST, "SMALLEST_SCALE": SMALLEST_SCALE}


def _empty_rows(y: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    return y.new_empty(y.shape, dtype=FLOAT8), y.new_empty((y.shape[0], 1), dtype=torch.float32)


@triton_op("qwen_image::quantized_gelu", mutates_args=())
def forward_op(y: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """y [M, K] contiguous → gelu(y) as float8 [M, K] and scales float32 [M, 1]."""
    values, scales = _empty_rows(y)
    wrap_triton(gelu_kernel)[(y.shape[0],)](y, values, scales, **tiles(y.shape[1]), num_warps=WARPS)
    return values, scales


@forward_op.register_fake
def _(y: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    return _empty_rows(y)


@triton_op("qwen_image::quantized_gelu_gradient", mutates_args=())
def backward_op(
    gradient: torch.Tensor, y: torch.Tensor, weight_scale: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """gradient and y [M, K], weight_scale [1, K], contiguous → gradient·gelu'(y)·weight_scale, float8 and scales as above."""
    values, scales = _empty_rows(y)
    wrap_triton(gelu_gradient_kernel)[(y.shape[0],)](
        gradient, y, weight_scale, values, scales, **tiles(y.shape[1]), num_warps=WARPS
    )
    return values, scales


@backward_op.register_fake
def _(gradient: torch.Tensor, y: torch.Tensor, weight_scale: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    return _empty_rows(y)
