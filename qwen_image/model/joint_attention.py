"""The attention of a block as a module: projections and norms of each stream, one attention over [text, image]."""

from collections.abc import Sequence
from typing import Protocol

import torch
from torch import nn

from qwen_image.model.attention import joint_attention
from qwen_image.model.joint_layout import Norms, Updates, joint_layout, takes_updates
from qwen_image.model.layers import Linear, RMSNorm
from qwen_image.model.rotary import Rotary


class Projection(Protocol):
    """Several layers over one input as one, with their LoRA.

    Attributes:
        uniform: rank and scale of the LoRA, if all of the layers have one and the same; else None.
    """

    uniform: tuple[int, float] | None

    def __call__(self, x: torch.Tensor, layers: Sequence[nn.Module]) -> torch.Tensor:
        """x [B, L, D] → the layers' outputs side by side."""

    def unfinished(self, x: torch.Tensor, layers: Sequence[nn.Module]) -> tuple[torch.Tensor, Updates]:
        """The same without the updates of a uniform LoRA, and these."""


class JointAttention(nn.Module):
    """One attention over [text, image]; each stream has its own projections and norms."""

    def __init__(self, dim: int, heads: int):
        super().__init__()
        self.heads = heads
        self.to_q, self.to_k, self.to_v = Linear(dim, dim), Linear(dim, dim), Linear(dim, dim)
        self.add_q_proj, self.add_k_proj, self.add_v_proj = Linear(dim, dim), Linear(dim, dim), Linear(dim, dim)
        self.norm_q, self.norm_k = RMSNorm(dim // heads), RMSNorm(dim // heads)
        self.norm_added_q, self.norm_added_k = RMSNorm(dim // heads), RMSNorm(dim // heads)
        self.to_out = nn.ModuleList([Linear(dim, dim)])
        self.to_add_out = Linear(dim, dim)
        # These may do the work of the layers (train/step/fused_projection.py).
        self.image_projection: Projection | None = None
        self.text_projection: Projection | None = None
        self.invertible_norms = False

    def norms(self) -> Norms:
        return Norms(self.norm_q, self.norm_k, self.norm_added_q, self.norm_added_k)

    def image_layers(self) -> tuple[nn.Module, ...]:
        """What makes the image's q, k and v."""
        return self.to_q, self.to_k, self.to_v

    def text_layers(self, with_query: bool) -> tuple[nn.Module, ...]:
        """What makes the text's q, k and v; the last block's query is never used."""
        return (self.add_q_proj, self.add_k_proj, self.add_v_proj)[0 if with_query else 1 :]

    def _project(
        self, image: torch.Tensor, text: torch.Tensor, with_text_query: bool
    ) -> tuple[torch.Tensor, torch.Tensor, tuple[Updates, Updates] | None]:
        """The layers' outputs side by side, of image and text; and the updates that are left to the joint layout."""
        fused, fused_text = self.image_projection, self.text_projection
        layers, text_layers = self.image_layers(), self.text_layers(with_text_query)
        if fused is None or fused_text is None:
            image, text = (
                torch.cat([layer(x) for layer in some], -1) for x, some in ((image, layers), (text, text_layers))
            )
            return image, text, None
        lora = fused.uniform
        if lora is None or lora != fused_text.uniform or not self._can_leave(image, text, rank=lora[0]):
            return fused(image, layers), fused_text(text, text_layers), None
        (image, of_image), (text, of_text) = fused.unfinished(image, layers), fused_text.unfinished(text, text_layers)
        return image, text, (of_image, of_text)

    def _can_leave(self, image: torch.Tensor, text: torch.Tensor, rank: int) -> bool:
        return takes_updates(image, text, self.norms(), self.invertible_norms, rank)

    def forward(
        self,
        image: torch.Tensor,
        text: torch.Tensor,
        rotary: Rotary,
        keep: torch.Tensor | None,
        dense_padding: bool,
        image_only: bool,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """image [B,S,D], text [B,T,D], keep bool [B,T+S] or None → attended image and text (None if image_only)."""
        image, text, updates = self._project(image, text, with_text_query=not image_only)
        query, key, value = joint_layout(
            image, text, self.norms(), rotary, keep if dense_padding else None, self.invertible_norms, updates
        )
        attended = joint_attention(
            query.transpose(1, 2), key.transpose(1, 2), value.transpose(1, 2), keep, dense_padding, zeroed=True
        )
        attended = attended.transpose(1, 2).flatten(2)
        if image_only:
            return self.to_out[0](attended), None
        text_tokens = text.shape[1]
        return self.to_out[0](attended[:, text_tokens:]), self.to_add_out(attended[:, :text_tokens])
