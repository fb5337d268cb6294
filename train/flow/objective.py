"""Flow matching: which σ a sample gets, how noise is added, what the model must predict, how losses are weighted.

x_σ = (1 − σ)·x₀ + σ·ε,  target v = ε − x₀,  loss = weight(σ) · mean over elements of (prediction − v)².

Pure functions of tensors. All randomness of a sample comes from (seed, epoch, its index in the data set), so a global
batch has the same loss whatever number of ranks, accumulation steps or restarts computed it.
"""

import math
from functools import cache
from typing import Literal

import torch

from train.flow.timestep_sampling import SIGMA_STEPS, diffsynth_sigmas

WeightingName = Literal["none", "bsmntw", "sigma_sqrt", "cosmap"]


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
