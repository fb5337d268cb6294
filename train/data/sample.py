"""One training sample as it stands in a shard, and the error for one that cannot be read."""

from dataclasses import dataclass

import torch


class BrokenSample(ValueError):
    """A sample that can't be read; the message names it and says why."""


@dataclass(frozen=True)
class Sample:
    """One sample as it stands in the shard: encoded (`latent`, `prompt_embeds`) or an image (`pixels`)."""

    index: int
    key: str
    width: int  # pixels
    height: int
    caption: str
    latent: torch.Tensor | None = None  # [16, H/8, W/8], normalised, as stored (bf16)
    prompt_embeds: torch.Tensor | None = None  # [T, D], cut to max_prompt_tokens
    pixels: torch.Tensor | None = None  # uint8 [3, H, W], RGB
