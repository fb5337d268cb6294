"""The q, k and v projections of a stream as one matrix product, and their LoRA updates as two.

A block then launches half as many small products: on an H100 the host could not launch the separate ones as fast as the
card ran them. The frozen weights are laid side by side once and the layers keep views of them, so nothing is stored twice
and every parameter keeps its name.
"""

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from qwen_image.transformer import Block, QwenImageTransformer
from train.lora import ADAPTER, LoraSpec


class FusedProjection(nn.Module):
    """Several linear layers over the same input, of which any may carry a LoRA of PEFT's (without dropout or DoRA)."""

    weight: torch.Tensor
    bias: torch.Tensor

    def __init__(self, layers: Sequence[Any]):
        super().__init__()
        bases = [getattr(layer, "base_layer", layer) for layer in layers]
        self.rows = [base.out_features for base in bases]
        self.scales = [layer.scaling[ADAPTER] if hasattr(layer, "scaling") else None for layer in layers]
        # Buffers, not parameters: to optimizer and checkpoint the layers' own views are the weights.
        self.register_buffer("weight", torch.cat([base.weight.detach() for base in bases]), persistent=False)
        self.register_buffer("bias", torch.cat([base.bias.detach() for base in bases]), persistent=False)
        for base, weight, bias in zip(bases, self.weight.split(self.rows), self.bias.split(self.rows), strict=True):
            base.weight.data, base.bias.data = weight, bias

    def forward(self, x: torch.Tensor, layers: Sequence[Any]) -> torch.Tensor:
        """x [B, L, D] → the layers' outputs side by side [B, L, rows]; `layers` are those of the constructor."""
        output = F.linear(x, self.weight, self.bias)
        if any(scale is not None for scale in self.scales):
            down, up = [], []
            for layer, scale, rows in zip(layers, self.scales, self.rows, strict=True):
                if scale is None:
                    up.append(x.new_zeros(rows, 0))
                else:
                    down.append(layer.lora_A[ADAPTER].weight)
                    up.append(layer.lora_B[ADAPTER].weight * scale)
            output = output + F.linear(F.linear(x, torch.cat(down)), torch.block_diag(*up))
        return output


def can_fuse(spec: LoraSpec, lora_dtype: torch.dtype, base_dtype: torch.dtype) -> bool:
    """Whether PEFT's own forward would do the same: no dropout, no DoRA, no change of dtype in between."""
    return spec.dropout == 0 and not spec.dora and lora_dtype == base_dtype


@torch.no_grad()
def fuse_projections(transformer: QwenImageTransformer) -> None:
    """Give every block fused projections, one a stream; weights are moved once, block by block."""
    for block in transformer.transformer_blocks:
        assert isinstance(block, Block)
        attention = block.attn
        attention.image_projection = FusedProjection(attention.image_layers())
        attention.text_projection = FusedProjection(attention.text_layers(with_query=not block.is_last))
