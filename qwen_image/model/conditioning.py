"""What the transformer is conditioned on besides the noise level: prompt embeddings, a batch of one length with its padding.

Another kind of conditioning (source images, say) begins here: its tokens join the others in model/joint_attention.py, get their
positions in model/rotary.py, and enter training and sampling alike through `predict_velocity` (qwen_image/pipeline.py).
"""

from typing import NamedTuple

import torch


class Prompt(NamedTuple):
    """A batch of prompt embeddings, right-padded with zeros."""

    embeds: torch.Tensor  # [B, T, D]
    mask: torch.Tensor | None  # bool [B, T], True for real tokens; None when nothing is padding

    @classmethod
    def from_list(cls, embeds: list[torch.Tensor], text_padding: int = 1) -> "Prompt":
        """Pad a list of [T_i, D] to one length, a multiple of `text_padding` (fewer shapes mean fewer compilations)."""
        lengths = [len(item) for item in embeds]
        length = -(-max(lengths) // text_padding) * text_padding
        padded = embeds[0].new_zeros(len(embeds), length, embeds[0].shape[1])
        for row, item in zip(padded, embeds, strict=True):
            row[: len(item)] = item
        if min(lengths) == length:
            return cls(padded, None)
        mask = torch.arange(length)[None] < torch.tensor(lengths)[:, None]
        return cls(padded, mask.to(padded.device))

    def to(self, device: torch.device | str, dtype: torch.dtype | None = None) -> "Prompt":
        return Prompt(self.embeds.to(device, dtype), None if self.mask is None else self.mask.to(device))
