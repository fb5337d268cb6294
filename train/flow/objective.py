"""Flow matching: which σ a sample gets, how noise is added, what the model must predict, how losses are weighted.

x_σ = (1 − σ)·x₀ + σ·ε,  target v = ε − x₀,  loss = weight(σ) · mean over elements of (prediction − v)².

Pure functions of tensors. All randomness of a sample comes from (seed, epoch, its index in the data set), so a global
batch has the same loss whatever number of ranks, accumulation steps or restarts computed it.
"""

import hashlib
import math
from dataclasses import dataclass, field
from functools import cache
from typing import Literal, NamedTuple

import torch

from qwen_image.noise_schedule import SigmaSchedule, shift_sigma

SamplingName = Literal["qwen_shift", "logit_normal", "uniform", "shift", "diffsynth"]
WeightingName = Literal["none", "bsmntw", "sigma_sqrt", "cosmap"]

SIGMA_STEPS = 1000  # σ lives on the grid k/1000, as in diffusers; so modulation can be tabulated

# DiffSynth-Studio trains Qwen-Image on a schedule of 1000 points with a constant shift e^0.8, stretched to end at 0.02.
_DIFFSYNTH_MU = 0.8
_DIFFSYNTH_TERMINAL = 0.02


@dataclass(frozen=True)
class SigmaSampling:
    """The distribution of σ in training (`--timestep_sampling` and its parameters)."""

    name: SamplingName = "qwen_shift"
    logit_mean: float = 0.0
    logit_std: float = 1.0
    shift: float = 2.2  # for `shift`: musubi-tuner's constant for Qwen-Image
    schedule: SigmaSchedule = field(default_factory=SigmaSchedule)  # for `qwen_shift`: the checkpoint's own


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


def draw_sigma(sampling: SigmaSampling, image_tokens: int, generator: torch.Generator) -> float:
    """One σ from the distribution, rounded to k/1000 with k = 1 … 1000."""
    if sampling.name == "uniform":
        u = torch.rand((), generator=generator, dtype=torch.float64)
    elif sampling.name == "diffsynth":
        index = torch.randint(SIGMA_STEPS, (), generator=generator)
        u = diffsynth_sigmas()[index]
    else:
        normal = torch.randn((), generator=generator, dtype=torch.float64)
        if sampling.name == "logit_normal":
            u = torch.sigmoid(sampling.logit_mean + sampling.logit_std * normal)
        elif sampling.name == "shift":
            u = shift_sigma(torch.sigmoid(normal), math.log(sampling.shift))
        else:
            u = shift_sigma(torch.sigmoid(normal), sampling.schedule.mu(image_tokens))
    return min(max(round(u.item() * SIGMA_STEPS), 1), SIGMA_STEPS) / SIGMA_STEPS


@cache
def diffsynth_sigmas() -> torch.Tensor:
    """float64 [1000]: DiffSynth-Studio's training schedule (its `set_timesteps_qwen_image(1000)`), from 1 to 0.02."""
    grid = torch.linspace(1, 0, SIGMA_STEPS + 1, dtype=torch.float64)[:-1]
    remaining = 1 - shift_sigma(grid, _DIFFSYNTH_MU)
    return 1 - remaining / (remaining[-1] / (1 - _DIFFSYNTH_TERMINAL))


@cache
def _bsmntw_floor_and_scale() -> tuple[float, float]:
    """Minimum of the bell over DiffSynth's schedule, and the factor that makes the weights' mean 1 there."""
    bell = torch.exp(-2 * (diffsynth_sigmas() - 0.5) ** 2)
    return bell.min().item(), SIGMA_STEPS / (bell - bell.min()).sum().item()


def loss_weight(name: WeightingName, sigma: torch.Tensor) -> torch.Tensor:
    """float32 [B] weights for σ [B].

    `bsmntw`: DiffSynth-Studio's bell around ½ over its own schedule; `sigma_sqrt` and `cosmap`: diffusers'
    `compute_loss_weighting_for_sd3`.
    """
    sigma = sigma.float()
    if name == "none":
        return torch.ones_like(sigma)
    if name == "bsmntw":
        floor, scale = _bsmntw_floor_and_scale()
        return (torch.exp(-2 * (sigma - 0.5) ** 2) - floor) * scale
    if name == "sigma_sqrt":
        return sigma**-2
    return 2 / (math.pi * (1 - 2 * sigma + 2 * sigma**2))


def add_noise(latents: torch.Tensor, noise: torch.Tensor, sigma: torch.Tensor) -> torch.Tensor:
    """x_σ in float32; `latents` and `noise` [B, …], σ [B]."""
    sigma = sigma.float().view(-1, *[1] * (latents.ndim - 1))
    return (1 - sigma) * latents.float() + sigma * noise.float()


def velocity_target(latents: torch.Tensor, noise: torch.Tensor) -> torch.Tensor:
    """ε − x₀ in float32: what the transformer must predict at every σ."""
    return noise.float() - latents.float()


def flow_matching_loss(prediction: torch.Tensor, target: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """float32 [B]: each sample's mean squared error over all its elements, times its weight [B]."""
    squared_error = (prediction.float() - target.float()) ** 2
    return squared_error.flatten(1).mean(1) * weight
