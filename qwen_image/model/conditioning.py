"""What the transformer is conditioned on besides the noise level: prompt embeddings, and the source images of an edit.

Text to image is the case of no sources. All that a source image changes is decided here and in the places named:

- its packed latents stand after the target's in the image stream (`join`), unnoised;
- its tokens have the target's kind of positions, with the image's number as their frame (model/rotary.py);
- in models with `zero_cond_t` its tokens are modulated as at the noise level 0, for they are clean (`source_tokens`,
  model/transformer.py); in the others as the target's;
- the velocity, and so the loss, is that of the target's tokens alone: the first (model/transformer.py).

Another kind of conditioning begins here as well: training and sampling take it alike through `predict_velocity`
(qwen_image/pipeline.py).
"""

from functools import lru_cache
from typing import NamedTuple

import torch

from qwen_image.model.sizes import PATCH

Grids = tuple[tuple[int, int], ...]  # rows and columns of tokens of each image: the target's, then those of the sources


class Prompt(NamedTuple):
    """A batch of prompts: embeddings, right-padded with zeros, and the source images that they speak of."""

    embeds: torch.Tensor  # [B, T, D]
    mask: torch.Tensor | None  # bool [B, T], True for real tokens; None when nothing is padding
    sources: tuple[torch.Tensor, ...] = ()  # normalized latents of each sample's n-th source image, [B, 16, 1, h, w]

    @classmethod
    def from_list(
        cls, embeds: list[torch.Tensor], text_padding: int = 1, sources: tuple[torch.Tensor, ...] = ()
    ) -> "Prompt":
        """Pad a list of [T_i, D] to one length, a multiple of `text_padding` (fewer shapes mean fewer compilations)."""
        lengths = [len(item) for item in embeds]
        length = -(-max(lengths) // text_padding) * text_padding
        padded = embeds[0].new_zeros(len(embeds), length, embeds[0].shape[1])
        for row, item in zip(padded, embeds, strict=True):
            row[: len(item)] = item
        if min(lengths) == length:
            return cls(padded, None, sources)
        mask = torch.arange(length)[None] < torch.tensor(lengths)[:, None]
        return cls(padded, mask.to(padded.device), sources)

    def to(self, device: torch.device | str, dtype: torch.dtype | None = None) -> "Prompt":
        mask = None if self.mask is None else self.mask.to(device)
        return Prompt(self.embeds.to(device, dtype), mask, tuple(each.to(device, dtype) for each in self.sources))

    def grids(self, rows: int, columns: int) -> Grids:
        """Of a target of rows × columns tokens and the sources."""
        return (rows, columns), *((each.shape[-2] // PATCH, each.shape[-1] // PATCH) for each in self.sources)


def pack_latents(latents: torch.Tensor) -> torch.Tensor:
    """[B, C, 1, H/8, W/8] → tokens [B, (H/16)·(W/16), 4·C]: each token holds a 2 × 2 patch, channel-major."""
    batch, channels, _, height, width = latents.shape
    patches = latents.reshape(batch, channels, height // PATCH, PATCH, width // PATCH, PATCH)
    return patches.permute(0, 2, 4, 1, 3, 5).reshape(batch, (height // PATCH) * (width // PATCH), channels * PATCH**2)


def unpack_latents(tokens: torch.Tensor, rows: int, columns: int) -> torch.Tensor:
    """The inverse of `pack_latents` for an image of rows × columns tokens."""
    batch, _, channels = tokens.shape
    patches = tokens.reshape(batch, rows, columns, channels // PATCH**2, PATCH, PATCH).permute(0, 3, 1, 4, 2, 5)
    return patches.reshape(batch, channels // PATCH**2, 1, rows * PATCH, columns * PATCH)


def join(latents: torch.Tensor, sources: tuple[torch.Tensor, ...]) -> torch.Tensor:
    """The image stream's tokens: packed latents [B, S, 64] of the target, then those of the sources in order."""
    return torch.cat([latents, *(pack_latents(each).to(latents.dtype) for each in sources)], 1) if sources else latents


def target_tokens(grids: Grids) -> int:
    """How many of the image stream's tokens, the first ones, are the target's."""
    return grids[0][0] * grids[0][1]


@lru_cache(maxsize=64)
def source_tokens(grids: Grids, device: torch.device) -> torch.Tensor | None:
    """bool [1, S, 1]: which of the image stream's tokens are of source images; None when there are none."""
    if len(grids) == 1:
        return None
    tokens = sum(rows * columns for rows, columns in grids)
    return (torch.arange(tokens) >= target_tokens(grids))[None, :, None].to(device)
