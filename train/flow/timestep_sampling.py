"""How the noise level σ of a training sample is drawn (`--timestep_sampling`)."""

import math
from dataclasses import dataclass, field
from functools import cache
from typing import Literal

import torch

from qwen_image.noise_schedule import SigmaSchedule, shift_sigma
from train.config.train_config import TrainConfig

SamplingName = Literal["qwen_shift", "logit_normal", "uniform", "shift", "diffsynth"]


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

    @classmethod
    def from_config(cls, config: TrainConfig, schedule: SigmaSchedule) -> "SigmaSampling":
        return cls(config.timestep_sampling, config.logit_mean, config.logit_std, config.timestep_shift, schedule)


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
