"""What chance decides for one sample of one epoch: σ, noise, whether the caption is dropped."""

import hashlib
from typing import NamedTuple

import torch

from train.flow.timestep_sampling import SigmaSampling, draw_sigma


class Draws(NamedTuple):
    """What chance decides for one sample of one epoch."""

    noise: torch.Tensor  # float32, the latent's shape
    sigma: float  # k/1000 with k = 1 … 1000
    drop_caption: bool


def sample_generator(seed: int, epoch: int, index: int) -> torch.Generator:
    """A CPU generator that belongs to one sample in one epoch (hashed, so that neighbours are unrelated)."""
    digest = hashlib.blake2b(f"{seed}/{epoch}/{index}".encode(), digest_size=8).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest, "little") >> 1)


def sample_draws(
    seed: int, epoch: int, index: int, latent_shape: tuple[int, ...], sampling: SigmaSampling, caption_dropout: float
) -> Draws:
    """Draw σ, caption dropout and noise, in this order, for the sample `index` (repeats of a data set count on).

    `latent_shape` ends in (H/8, W/8); σ's shift depends on the number of packed tokens, (H/16)·(W/16).
    """
    generator = sample_generator(seed, epoch, index)
    image_tokens = (latent_shape[-2] // 2) * (latent_shape[-1] // 2)
    sigma = draw_sigma(sampling, image_tokens, generator)
    drop_caption = torch.rand((), generator=generator).item() < caption_dropout
    return Draws(torch.randn(latent_shape, generator=generator), sigma, drop_caption)
