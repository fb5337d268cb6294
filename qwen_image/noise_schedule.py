"""The noise levels σ: the shift that depends on the image's size, inference schedules, the Euler step.

Formulas and constants are those of diffusers 0.42.1 (`FlowMatchEulerDiscreteScheduler` as `QwenImagePipeline` calls
it) and of Qwen-Image's own `scheduler/scheduler_config.json`; the arithmetic keeps its precision (numpy float32), so
that schedules are equal to the last bit.
"""

import math
from dataclasses import dataclass, fields
from pathlib import Path

import numpy as np
import torch

from files.json_object import read_json_object

# Each of these would change the schedule silently if a checkpoint used it; Qwen-Image uses none.
_UNSUPPORTED_FLAGS = (
    "use_karras_sigmas",
    "use_exponential_sigmas",
    "use_beta_sigmas",
    "invert_sigmas",
    "stochastic_sampling",
)


@dataclass(frozen=True)
class SigmaSchedule:
    """How σ depends on the number of image tokens. Field names are those of `scheduler_config.json`."""

    base_shift: float = 0.5
    max_shift: float = 0.9
    base_image_seq_len: int = 256
    max_image_seq_len: int = 8192
    shift_terminal: float | None = 0.02
    num_train_timesteps: int = 1000

    @classmethod
    def from_config_file(cls, path: Path) -> "SigmaSchedule":
        """Read `scheduler_config.json`. Raises ValueError for schedules that Qwen-Image does not have."""
        config = read_json_object(path)
        unsupported = [name for name in _UNSUPPORTED_FLAGS if config.get(name)]
        if unsupported:
            raise ValueError(
                f"{path}: {', '.join(unsupported)} is set, but only Qwen-Image's own schedule is supported"
            )
        if (
            not config.get("use_dynamic_shifting", False)
            or config.get("time_shift_type", "exponential") != "exponential"
        ):
            raise ValueError(
                f"{path}: Qwen-Image shifts σ by the image's size (use_dynamic_shifting true, time_shift_type "
                "exponential); this file belongs to another model"
            )
        return cls(**{field.name: config[field.name] for field in fields(cls) if field.name in config})

    def mu(self, image_tokens: int) -> float:
        """Logarithm of the shift for an image of `image_tokens` packed tokens: linear between the two base points."""
        slope = (self.max_shift - self.base_shift) / (self.max_image_seq_len - self.base_image_seq_len)
        return image_tokens * slope + self.base_shift - slope * self.base_image_seq_len

    def sigmas(self, num_inference_steps: int, image_tokens: int) -> torch.Tensor:
        """float32 [num_inference_steps + 1] on the CPU: from 1 down to `shift_terminal`, then 0."""
        if num_inference_steps < 1:
            raise ValueError(f"num_inference_steps must be at least 1, got {num_inference_steps}")
        sigma: np.ndarray = np.linspace(1.0, 1 / num_inference_steps, num_inference_steps).astype(np.float32)
        shift = math.exp(self.mu(image_tokens))
        sigma = shift / (shift + (1 / sigma - 1))  # numpy keeps float32 beside Python floats
        if self.shift_terminal:
            remaining = 1 - sigma
            # One step starts at σ = 1 and has nothing to stretch; diffusers divides 0 by 0 there.
            stretch = remaining[-1] / (1 - self.shift_terminal) if num_inference_steps > 1 else 1.0
            sigma = 1 - remaining / stretch
        return torch.cat([torch.from_numpy(sigma.astype(np.float32)), torch.zeros(1)])


def shift_sigma(u: torch.Tensor, mu: float) -> torch.Tensor:
    """Move noise levels u in (0, 1) towards 1 by the factor e^mu: e^mu·u / (1 + (e^mu − 1)·u)."""
    factor = math.exp(mu)
    return factor * u / (1 + (factor - 1) * u)


def euler_step(
    latents: torch.Tensor, velocity: torch.Tensor, sigma: torch.Tensor, sigma_next: torch.Tensor
) -> torch.Tensor:
    """x + v·(σ_next − σ) in float32, returned in the velocity's dtype. Shapes of `latents` and `velocity` are equal."""
    return (latents.float() + (sigma_next - sigma) * velocity).to(velocity.dtype)
