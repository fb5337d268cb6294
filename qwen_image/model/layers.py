"""The transformer's small parts: linear layers, RMS norm, MLP, time embedding. Attribute names are the checkpoint's."""

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import nn

from qwen_image.kernels.layout_shapes import NORM_EPS

SINUSOID_CHANNELS = 256
SINUSOID_SCALE = 1000


class Linear(nn.Linear):
    """nn.Linear that leaves its memory uninitialized: weights always come from a checkpoint."""

    def reset_parameters(self) -> None:
        pass


class RMSNorm(nn.Module):
    """x / rms(x) · weight over the last axis, in float32, rounded to the weight's dtype before the product."""

    def __init__(self, dim: int):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(dim))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = x.float()
        x = x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + NORM_EPS)
        return x.to(self.weight.dtype) * self.weight


class GELUProjection(nn.Module):
    """Linear, then GELU with the tanh approximation. The attribute `proj` is part of the checkpoint's names."""

    def __init__(self, dim: int, hidden_dim: int):
        super().__init__()
        self.proj = Linear(dim, hidden_dim)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.gelu(self.proj(x), approximate="tanh")


class FeedForward(nn.Module):
    """dim → 4·dim → dim. The list `net` with its gap at 1 is part of the checkpoint's names.

    Attributes:
        fused: called with the input and both linear layers, it may do the work of all, or return None
        (qwen_image/float8/linear.py).
    """

    def __init__(self, dim: int):
        super().__init__()
        self.net = nn.ModuleList([GELUProjection(dim, 4 * dim), nn.Identity(), Linear(4 * dim, dim)])
        self.fused: Callable[[torch.Tensor, nn.Module, nn.Module], torch.Tensor | None] | None = None

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        up, down = self.net[0], self.net[2]
        assert isinstance(up, GELUProjection)
        output = None if self.fused is None else self.fused(x, up.proj, down)
        return down(up(x)) if output is None else output


class TimestepEmbedder(nn.Module):
    """256 sinusoids (cosines first) → linear → SiLU → linear."""

    def __init__(self, dim: int):
        super().__init__()
        self.linear_1 = Linear(SINUSOID_CHANNELS, dim)
        self.linear_2 = Linear(dim, dim)

    def forward(self, timestep: torch.Tensor) -> torch.Tensor:
        """timestep [B] in the model's dtype, σ's range → [B, dim]."""
        half = SINUSOID_CHANNELS // 2
        exponent = -math.log(10000) * torch.arange(half, dtype=torch.float32, device=timestep.device) / half
        angles = SINUSOID_SCALE * (timestep[:, None].float() * torch.exp(exponent))
        sinusoid = torch.cat([angles.cos(), angles.sin()], dim=-1).to(timestep.dtype)
        return self.linear_2(F.silu(self.linear_1(sinusoid)))
