"""Linear layers of a frozen base in float8: half of bf16's memory, and up to twice its speed on a GPU that multiplies float8.

    use_float8(transformer, torch.bfloat16)  # on the meta device; qwen_image/loading/staged.py fills it
    quantize_blocks(transformer)             # or layer by layer when the weights are there already
    keep_transposed(transformer, 12)         # the first 12 blocks are recomputed: they do with one layout

A layer y = x·Wᵀ + b has three products in training: the output x·Wᵀ, the input's gradient g·W, and the weight's gradient
gᵀ·x. The base is frozen, so the last falls away, and with it the need to keep x. W is quantized once, while loading; x and g
are at each product, row by row. How that works: qwen_image/float8/scaled_rows.py. Biases, norms, the modulation and the LoRA
keep the model's dtype; with a LoRA on it, a layer's factors see x as it was.
"""

from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

from qwen_image.float8.mlp import float8_mlp, has_kernel
from qwen_image.float8.scaled_rows import FLOAT8, Float8Weight, quantize_rows
from qwen_image.model.layers import Linear
from qwen_image.model.transformer import Block, QwenImageTransformer

ROWS_AT_ONCE = 2048  # of a weight while it is quantized: its float32 copy stays below 100 MB
FIRST_CAPABILITY = (8, 9)  # Ada, Hopper and later multiply float8


class _Product(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, bias: torch.Tensor, *weight: Any) -> torch.Tensor:
        ctx.save_for_backward(*weight)
        return Float8Weight(*weight).output(x.flatten(0, -2), bias).unflatten(0, x.shape[:-1])

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> Any:
        (gradient,) = gradients
        weight = Float8Weight(*ctx.saved_tensors)
        flat = weight.input_gradient(gradient.flatten(0, -2))
        return flat.unflatten(0, gradient.shape[:-1]), None, None, None, None, None


def float8_linear(x: torch.Tensor, weight: Float8Weight, bias: torch.Tensor) -> torch.Tensor:
    """x [..., K] → x·Wᵀ + bias [..., N] with a gradient for x alone."""
    return _Product.apply(x, bias, *weight)


class Float8Linear(Linear):
    """A frozen linear layer whose `weight` is float8; input, bias and output keep the model's dtype.

    Attributes:
        compute_dtype: the model's dtype, under the name by which PEFT asks for it.
        fused: a fused projection does this layer's work (train/step/fused_projection.py): it never needs `transposed`.
    """

    scale: torch.Tensor
    ones: torch.Tensor
    transposed: torch.Tensor | None

    def __init__(self, in_features: int, out_features: int, dtype: torch.dtype = torch.bfloat16):
        super().__init__(in_features, out_features, device="meta", dtype=dtype)
        self.requires_grad_(False)
        self.compute_dtype = dtype
        self.fused = False
        for name in ("scale", "ones", "transposed"):
            self.register_buffer(name, None, persistent=False)

    @torch.no_grad()
    def quantize(self, weight: torch.Tensor) -> None:
        """Take `weight` [out, in] of any floating type; it is not kept."""
        data = torch.empty(weight.shape, dtype=FLOAT8, device=weight.device)
        self.scale = torch.empty(1, len(weight), dtype=torch.float32, device=weight.device)
        for start in range(0, len(weight), ROWS_AT_ONCE):
            rows = slice(start, start + ROWS_AT_ONCE)
            data[rows], scale = quantize_rows(weight[rows])
            self.scale[:, rows] = scale.t()
        self.ones = torch.ones(1, weight.shape[1], dtype=torch.float32, device=weight.device)
        self.weight = nn.Parameter(data, requires_grad=False)

    def allocate(self, device: torch.device) -> None:
        """Uninitialized memory for what `quantize` would make: another process sends it."""
        self.weight = nn.Parameter(torch.empty(self.weight.shape, dtype=FLOAT8, device=device), requires_grad=False)
        self.scale = torch.empty(1, self.out_features, dtype=torch.float32, device=device)
        self.ones = torch.ones(1, self.in_features, dtype=torch.float32, device=device)

    def keep_transposed(self, keep: bool) -> None:
        """Hold the weight in the backward pass's layout too: as much memory again, and no transposing at each step."""
        keep = keep and not self.fused
        if keep != (self.transposed is not None):
            self.transposed = self.weight.detach().t().contiguous() if keep else None

    def quantized(self) -> Float8Weight:
        return Float8Weight(self.weight, self.scale, self.ones, self.transposed)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return float8_linear(x, self.quantized(), self.bias)


def fused_mlp(x: torch.Tensor, up: nn.Module, down: nn.Module) -> torch.Tensor | None:
    """Both layers of an MLP with the GELU between, in one function; None where its kernels or the layers forbid that.

    With a LoRA on it a layer is of another type, and its input is needed.
    """
    if type(up) is Float8Linear and type(down) is Float8Linear and has_kernel(x, up.out_features):
        return float8_mlp(x, up.quantized(), up.bias, down.quantized(), down.bias)
    return None


def fuse_mlps(transformer: QwenImageTransformer) -> None:
    """Let `fused_mlp` do the blocks' MLPs where it can."""
    for block in transformer.transformer_blocks:
        assert isinstance(block, Block)
        block.img_mlp.fused = block.txt_mlp.fused = fused_mlp


def block_linears(transformer: QwenImageTransformer) -> Iterator[tuple[str, nn.Linear]]:
    """(full name, layer) of what becomes float8: both streams' projections and MLPs in all blocks, not the modulation."""
    for index, block in enumerate(transformer.transformer_blocks):
        assert isinstance(block, Block)
        for name, module in block.named_modules():
            if type(module) is Linear and name.split(".")[0] in ("attn", "img_mlp", "txt_mlp"):
                yield f"transformer_blocks.{index}.{name}", module


def use_float8(transformer: QwenImageTransformer, dtype: torch.dtype) -> None:
    """Put Float8Linear, still without weights, in the place of the blocks' layers; biases stay as they are."""
    for name, layer in list(block_linears(transformer)):
        replacement = Float8Linear(layer.in_features, layer.out_features, dtype)
        replacement.bias = layer.bias
        transformer.set_submodule(name, replacement)
    fuse_mlps(transformer)


@torch.no_grad()
def quantize_blocks(transformer: QwenImageTransformer, fuse: bool = True) -> None:
    """Turn the blocks' layers of a frozen transformer that has its weights into float8, one after the other.

    `fuse`: False leaves GELU and its quantization to the compiler, for comparison.
    """
    dtype = transformer.proj_out.weight.dtype
    for name in [name for name, _ in block_linears(transformer)]:  # no list of layers: it would keep their weights
        layer = transformer.get_submodule(name)
        assert isinstance(layer, nn.Linear)
        replacement = Float8Linear(layer.in_features, layer.out_features, dtype)
        replacement.bias = layer.bias
        replacement.quantize(layer.weight)
        transformer.set_submodule(name, replacement)
    if fuse:
        fuse_mlps(transformer)


@torch.no_grad()
def keep_transposed(transformer: QwenImageTransformer, checkpointed_blocks: int) -> None:
    """Both layouts in the blocks that are not recomputed, one in the `checkpointed_blocks` that are (to save memory).

    To be called whenever `transformer.checkpointed_blocks` changes; without float8, and the second time, it does nothing.
    """
    streamed = () if transformer.block_stream is None else transformer.block_stream.blocks
    for index, block in enumerate(transformer.transformer_blocks):
        for module in block.modules():
            if callable(keep := getattr(module, "keep_transposed", None)):
                keep(index >= checkpointed_blocks and index not in streamed)  # a slot holds now this, now that block


def float8_bytes(transformer: QwenImageTransformer, checkpointed_blocks: int) -> tuple[int, int]:
    """(parameters, bytes) that the blocks' float8 layers hold: data, scales, and the second layout where it is kept.

    The transformer may be on the meta device and need not be quantized. Biases are not counted.
    """
    parameters = total = 0
    for name, layer in block_linears(transformer):
        size = layer.in_features * layer.out_features
        layouts = 1 if int(name.split(".")[1]) < checkpointed_blocks else 2
        parameters += size
        total += layouts * size + 4 * (layer.in_features + layer.out_features)
    return parameters, total


def check_float8(device: torch.device, dtype: torch.dtype) -> list[str]:
    """Lines to tell the user. Raises ValueError when `device` can't multiply float8 for a model of `dtype`."""
    if device.type != "cuda":
        return ["base_precision float8 is emulated on the CPU: the same numbers, but slow"]
    capability = torch.cuda.get_device_capability(device)
    if capability < FIRST_CAPABILITY:
        raise ValueError(
            f"base_precision float8 needs a GPU of compute capability {FIRST_CAPABILITY[0]}.{FIRST_CAPABILITY[1]} or newer "
            f"(Ada, Hopper, Blackwell), but {torch.cuda.get_device_name(device)} has {capability[0]}.{capability[1]}: "
            "use --base_precision dtype"
        )
    if dtype != torch.bfloat16:
        raise ValueError(
            f"base_precision float8 computes in bfloat16 on a GPU, got dtype {str(dtype).removeprefix('torch.')}: "
            "use --dtype bfloat16"
        )
    return []
