"""The q, k and v projections of a stream as one matrix product, their LoRA updates added to its output in place.

A block then launches fewer products: on an H100 the host could not launch the separate ones as fast as the card ran them.
The frozen weights are laid side by side once and the layers keep views of them, so nothing is stored twice and every
parameter keeps its name. A float8 base (qwen_image/float8/linear.py) quantizes its input once for all of them.

Where the joint layout's kernel adds the updates (qwen_image/model/joint_layout.py), only their factors x·Aᵀ are computed here.
Elsewhere, left to autograd and its compiler, they would cost small kernels and copies: a block-diagonal matrix
put together and taken apart in every block, and a whole product copied before another was added to it. `add_products_`
adds in the product's own epilogue.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import nn

from qwen_image.float8.linear import Float8Linear, Float8Weight, float8_linear
from qwen_image.model.joint_layout import Updates
from qwen_image.model.transformer import Block, QwenImageTransformer
from train.lora.spec import ADAPTER, LoraSpec


@torch.library.custom_op("qwen_image_lora::add_products_", mutates_args=("total",))
def add_products_(
    total: torch.Tensor, factors: torch.Tensor, weights: list[torch.Tensor], scales: list[float], columns: list[int]
) -> None:
    """total [M, N]: from each column in `columns` on, add the next rᵢ columns of factors [M, Σr] · weightᵢ [nᵢ, rᵢ]ᵀ · scaleᵢ.

    An operator, because a compiler that sees the addition makes a copy of `total` first.
    """
    first = 0
    for weight, scale, column in zip(weights, scales, columns, strict=True):
        rows, rank = weight.shape
        total[:, column : column + rows].addmm_(factors[:, first : first + rank], weight.t(), alpha=scale)
        first += rank


def scaled(values: torch.Tensor, scale: float) -> torch.Tensor:
    return values if scale == 1 else values * scale


class _Base(NamedTuple):
    """The frozen weights of all layers, side by side; in float8 with what qwen_image/float8/scaled_rows.py wants to know."""

    weight: torch.Tensor
    scale: torch.Tensor | None
    ones: torch.Tensor | None
    transposed: torch.Tensor | None

    def quantized(self) -> Float8Weight | None:
        """The same as what float8 products take; None in another type."""
        if self.scale is None or self.ones is None:
            return None
        return Float8Weight(self.weight, self.scale, self.ones, self.transposed)

    def output(self, flat: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
        """flat [M, K] → [M, rows]."""
        quantized = self.quantized()
        return F.linear(flat, self.weight, bias) if quantized is None else quantized.output(flat, bias)

    def input_gradient(
        self, gradient: torch.Tensor, of_factors: torch.Tensor, downs: Sequence[torch.Tensor]
    ) -> torch.Tensor:
        """The output's gradient [M, rows] and the factors' [M, Σr] → the input's [M, K]."""
        quantized = self.quantized()
        of_x = gradient @ self.weight if quantized is None else quantized.input_gradient(gradient)
        add_products_(of_x, of_factors, [torch.cat(list(downs)).t()], [1.0], [0])
        return of_x


class _Unfinished(torch.autograd.Function):
    """Base product, and the factors of the LoRA updates that somebody else adds. `downs`: lora_A [r, K] of each layer."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, bias: torch.Tensor, *rest: Any) -> tuple[torch.Tensor, torch.Tensor]:
        base, downs = _Base(*rest[:4]), rest[4:]
        flat = x.flatten(0, -2)
        ctx.save_for_backward(x, *rest)
        factors = F.linear(flat, torch.cat(downs))
        return tuple(each.unflatten(0, x.shape[:-1]) for each in (base.output(flat, bias), factors))

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> Any:
        x, *rest = ctx.saved_tensors
        base, downs = _Base(*rest[:4]), rest[4:]
        gradient, of_factors = (each.flatten(0, -2) for each in gradients)
        of_downs = (of_factors.t() @ x.flatten(0, -2)).split([down.shape[0] for down in downs])
        of_x = None
        if ctx.needs_input_grad[0]:
            of_x = base.input_gradient(gradient, of_factors, downs).unflatten(0, x.shape[:-1])
        return of_x, None, None, None, None, None, *of_downs


class _Projection(torch.autograd.Function):
    """Base product and LoRA updates. `adapters`: lora_A [r, K] of each adapted layer, then lora_B [n, r] of each.

    What autograd would save and compute, less the block-diagonal matrix; the frozen weight gets no gradient.
    """

    @staticmethod
    def forward(
        ctx: Any, x: torch.Tensor, bias: torch.Tensor, scales: list[float], columns: list[int], *rest: Any
    ) -> torch.Tensor:
        base, adapters = _Base(*rest[:4]), rest[4:]
        flat = x.flatten(0, -2)
        output = base.output(flat, bias)
        downs, ups = adapters[: len(scales)], adapters[len(scales) :]
        factors = F.linear(flat, torch.cat(downs))
        add_products_(output, factors, list(ups), scales, columns)
        ctx.scales, ctx.columns = scales, columns
        ctx.save_for_backward(x, factors, *rest)
        return output.unflatten(0, x.shape[:-1])

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> Any:
        x, factors, *rest = ctx.saved_tensors
        base, adapters = _Base(*rest[:4]), rest[4:]
        scales, columns = ctx.scales, ctx.columns
        downs, ups = adapters[: len(scales)], adapters[len(scales) :]
        ranks = [down.shape[0] for down in downs]
        gradient = gradients[0].flatten(0, -2)
        parts = [gradient[:, column : column + up.shape[0]] for column, up in zip(columns, ups, strict=True)]
        of_factors = torch.cat(
            [scaled(part @ up, scale) for part, up, scale in zip(parts, ups, scales, strict=True)], 1
        )
        of_ups = [
            scaled(part.t() @ factor, scale)
            for part, factor, scale in zip(parts, factors.split(ranks, 1), scales, strict=True)
        ]
        of_downs = (of_factors.t() @ x.flatten(0, -2)).split(ranks)
        of_x = None
        if ctx.needs_input_grad[0]:
            of_x = base.input_gradient(gradient, of_factors, downs).unflatten(0, x.shape[:-1])
        return of_x, None, None, None, None, None, None, None, *of_downs, *of_ups


class FusedProjection(nn.Module):
    """Several linear layers over the same input, of which any may carry a LoRA of PEFT's (without dropout or DoRA).

    Attributes:
        uniform: rank and scale of the LoRA, if all of the layers have one and the same; else None.
    """

    weight: torch.Tensor
    bias: torch.Tensor
    scale: torch.Tensor | None
    ones: torch.Tensor | None
    transposed: torch.Tensor | None

    def __init__(self, layers: Sequence[Any]):
        super().__init__()
        bases = [getattr(layer, "base_layer", layer) for layer in layers]
        rows = [base.out_features for base in bases]
        adapted = [(layer, sum(rows[:i])) for i, layer in enumerate(layers) if hasattr(layer, "scaling")]
        self.scales = [float(layer.scaling[ADAPTER]) for layer, _ in adapted]
        self.columns = [column for _, column in adapted]
        kinds = {(layer.r[ADAPTER], float(layer.scaling[ADAPTER])) for layer, _ in adapted}
        self.uniform = kinds.pop() if len(adapted) == len(layers) and len(kinds) == 1 else None
        # Buffers, not parameters: to optimizer and checkpoint the layers' own views are the weights.
        self.register_buffer("weight", side_by_side([base.weight.detach() for base in bases]), persistent=False)
        self.register_buffer("bias", torch.cat([base.bias.detach() for base in bases]), persistent=False)
        for base, weight, bias in zip(bases, self.weight.split(rows), self.bias.split(rows), strict=True):
            base.weight.data, base.bias.data = weight, bias
        for name in ("scale", "ones", "transposed"):
            self.register_buffer(name, None, persistent=False)
        if all(isinstance(base, Float8Linear) for base in bases):
            self.scale = torch.cat([base.scale for base in bases], 1)
            self.ones = bases[0].ones
            for base in bases:
                base.fused = True

    def keep_transposed(self, keep: bool) -> None:
        """As Float8Linear's, for all the layers; without float8, nothing."""
        keep = keep and self.scale is not None
        if keep != (self.transposed is not None):
            self.transposed = self.weight.t().contiguous() if keep else None

    def forward(self, x: torch.Tensor, layers: Sequence[Any]) -> torch.Tensor:
        """x [B, L, D] → the layers' outputs side by side [B, L, rows]; `layers` are those of the constructor."""
        adapted = [layer for layer in layers if hasattr(layer, "scaling")]
        adapters = [layer.lora_A[ADAPTER].weight for layer in adapted]
        adapters += [layer.lora_B[ADAPTER].weight for layer in adapted]
        if adapters:
            return _Projection.apply(x, self.bias, self.scales, self.columns, *self.base(), *adapters)
        quantized = self.base().quantized()
        return F.linear(x, self.weight, self.bias) if quantized is None else float8_linear(x, quantized, self.bias)

    def unfinished(self, x: torch.Tensor, layers: Sequence[Any]) -> tuple[torch.Tensor, Updates]:
        """The same without the updates of a `uniform` LoRA, and these: the joint layout's kernel adds them."""
        downs = [layer.lora_A[ADAPTER].weight for layer in layers]
        output, factors = _Unfinished.apply(x, self.bias, *self.base(), *downs)
        return output, Updates(factors, tuple(layer.lora_B[ADAPTER].weight for layer in layers), self.scales[0])

    def base(self) -> _Base:
        return _Base(self.weight, self.scale, self.ones, self.transposed)


def side_by_side(weights: Sequence[torch.Tensor]) -> torch.Tensor:
    """The rows of all weights in one tensor; float8 too, which torch.cat does not know everywhere.

    Weights that lie side by side already (those of a streamed block do) are not copied: the tensor is a view of them.
    """
    first, end = weights[0], weights[0].data_ptr()
    rows = sum(len(weight) for weight in weights)
    for weight in weights:
        if not weight.is_contiguous() or weight.data_ptr() != end:
            break
        end += weight.numel() * weight.itemsize
    else:
        if first.untyped_storage().data_ptr() == weights[-1].untyped_storage().data_ptr():
            return first.as_strided((rows, first.shape[1]), (first.shape[1], 1)).data
    if weights[0].itemsize > 1:
        return torch.cat(list(weights))
    return torch.cat([weight.view(torch.uint8) for weight in weights]).view(weights[0].dtype)


def can_fuse(spec: LoraSpec, lora_dtype: torch.dtype, base_dtype: torch.dtype) -> bool:
    """Whether PEFT's own forward would do the same: no dropout, no DoRA, no LoKr, no change of dtype in between."""
    return spec.dropout == 0 and not spec.dora and not spec.is_lokr and lora_dtype == base_dtype


@torch.no_grad()
def fuse_projections(transformer: QwenImageTransformer) -> None:
    """Give every block fused projections, one a stream; weights are moved once, block by block."""
    for block in transformer.transformer_blocks:
        assert isinstance(block, Block)
        attention = block.attn
        attention.image_projection = FusedProjection(attention.image_layers())
        attention.text_projection = FusedProjection(attention.text_layers(with_query=not block.is_last))
