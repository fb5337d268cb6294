"""The MLP of a frozen bf16 base as one function, in which matrix products apply GELU and its gradient themselves.

As kernels of their own, which the compiler makes of PyTorch's operations, these took 70 µs forward and 97 backward a block
on an H100 at 1024²; in the epilogues of cuBLASLt's products (qwen_image/kernels/cublaslt.py) they take 42 and 33 beside
the plain products. The up projection's output is all that is kept, as before; GELU is computed before that is rounded.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from qwen_image.kernels import cublaslt
from qwen_image.model.layers import Linear
from qwen_image.model.transformer import Block, QwenImageTransformer

# False, too, where they proved wrong (qwen_image/kernel_check.py): then nothing here uses them.
HAS_EPILOGUES = cublaslt.library() is not None
SMALLEST_ALIGNMENT = 16  # bytes of a tensor's address, and of a row: what the fast kernels read at once


@torch.library.custom_op("qwen_image::gelu_product", mutates_args=())
def gelu_product(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """x [M, K], weight [N, K], bias [N] → gelu(y) and y = x·weightᵀ + bias, both [M, N]."""
    x = x.contiguous()
    if suits(x, weight, bias):
        return cublaslt.product_with_gelu(x, weight, bias)
    y = F.linear(x, weight, bias)
    return F.gelu(y, approximate="tanh"), y


@gelu_product.register_fake
def _(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    shape = x.shape[0], weight.shape[0]
    return x.new_empty(shape), x.new_empty(shape)


@torch.library.custom_op("qwen_image::gelu_gradient_product", mutates_args=())
def gelu_gradient_product(gradient: torch.Tensor, weight: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    """gradient [M, K], weight [K, N], y [M, N] → (gradient·weight)·gelu'(y) [M, N], y's gradient from that of the MLP."""
    gradient, y = gradient.contiguous(), y.contiguous()
    if suits(gradient, weight, y):
        return cublaslt.product_with_gelu_gradient(gradient, weight, y)
    return torch.ops.aten.gelu_backward(gradient @ weight, y, approximate="tanh")


@gelu_gradient_product.register_fake
def _(gradient: torch.Tensor, weight: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    return y.new_empty(y.shape)


def suits(*operands: torch.Tensor) -> bool:
    """Whether cuBLASLt can take these. By address, so only for tensors that are there: not while compiling."""
    return HAS_EPILOGUES and all(
        each.is_cuda
        and each.dtype == torch.bfloat16
        and each.is_contiguous()
        and each.data_ptr() % SMALLEST_ALIGNMENT == 0
        and each.shape[-1] * each.itemsize % SMALLEST_ALIGNMENT == 0
        and each.numel() > 0
        for each in operands
    )


class _MLP(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: torch.Tensor,
        up: torch.Tensor,
        up_bias: torch.Tensor,
        down: torch.Tensor,
        down_bias: torch.Tensor,
    ) -> torch.Tensor:
        gelu, y = torch.ops.qwen_image.gelu_product(x.flatten(0, -2), up, up_bias)
        ctx.save_for_backward(y, up, down)
        return F.linear(gelu, down, down_bias).unflatten(0, x.shape[:-1])

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> Any:
        (gradient,) = gradients
        y, up, down = ctx.saved_tensors
        of_x = None
        if ctx.needs_input_grad[0]:
            of_y = torch.ops.qwen_image.gelu_gradient_product(gradient.flatten(0, -2), down, y)
            of_x = (of_y @ up).unflatten(0, gradient.shape[:-1])
        return of_x, None, None, None, None


def can_fuse_gelu(x: torch.Tensor, up: nn.Linear, down: nn.Linear) -> bool:
    """Whether the epilogues can serve an MLP over x: bf16 on a GPU, frozen weights that are always there.

    Nothing here depends on the number of rows, of which the compiled blocks take any.
    """
    parameters = [up.weight, up.bias, down.weight, down.bias]
    return (
        HAS_EPILOGUES
        and x.is_cuda
        and x.dtype == torch.bfloat16
        and all(
            parameter is not None
            and parameter.dtype == torch.bfloat16
            and not parameter.requires_grad
            and not hasattr(parameter, "ds_id")  # partitioned by ZeRO-3: there only within a layer's forward
            and parameter.is_contiguous()
            and parameter.shape[-1] % 8 == 0
            for parameter in parameters
        )
    )


def gelu_mlp(x: torch.Tensor, up: nn.Module, down: nn.Module) -> torch.Tensor | None:
    """x [..., K] → gelu(x·Upᵀ + bias)·Downᵀ + bias with a gradient for x alone; None where the layers must do it.

    With a LoRA on it a layer is of another type, and its input is needed. Without gradients the products are the same, so
    that validation and sample images see the numbers that training sees.
    """
    if type(up) is Linear and type(down) is Linear and can_fuse_gelu(x, up, down):
        return _MLP.apply(x, up.weight, up.bias, down.weight, down.bias)
    return None


def fuse_gelu(transformer: QwenImageTransformer) -> None:
    """Let `gelu_mlp` do the image's MLPs, but those with a LoRA or in float8.

    Not the text's: over 128 rows GELU takes 3 µs.
    """
    for block in transformer.transformer_blocks:
        assert isinstance(block, Block)
        up, _, down = block.img_mlp.net
        if type(up.proj) is Linear and type(down) is Linear:
            block.img_mlp.fused = gelu_mlp
