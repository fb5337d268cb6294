"""Rotary position embedding (RoPE) of text and image tokens, with real numbers only (complex ones fall out of torch.compile).

Each pair of a head's channels is turned by an angle, position · θ^(−2i/dim), so a product of query and key depends on their
distance alone (Su et al. 2021). Here positions have three axes (frame, row, column) with channels of their own; the frame is
the image's number (0: the target); rows and columns of each image are centered; text continues on the diagonal, after the
longest half of all of them. Source: diffusers 0.42.1 `QwenEmbedRope` with `scale_rope=True`.
"""

from functools import lru_cache
from typing import NamedTuple

import torch

from qwen_image.model.conditioning import Grids

THETA = 10000.0


class Rotary(NamedTuple):
    """cos and sin of every token's angles, float32 [1, T + S, 1, head_dim]; each pair of channels shares its angle."""

    cos: torch.Tensor
    sin: torch.Tensor


@lru_cache(maxsize=64)
def rotary_table(text_tokens: int, grids: Grids, axes_dims: tuple[int, int, int], device: torch.device) -> Rotary:
    """Angles for the joint sequence [text, images], of images of so many rows and columns of packed tokens."""
    text = torch.arange(text_tokens) + max(max(rows // 2, columns // 2) for rows, columns in grids)
    images = torch.cat([_image_positions(frame, *grid) for frame, grid in enumerate(grids)])
    angles = torch.cat(
        [
            torch.cat([_angles(text, dim), _angles(position, dim)])
            for position, dim in zip(images.unbind(1), axes_dims, strict=True)
        ],
        dim=1,
    )
    angles = angles.repeat_interleave(2, dim=1)[None, :, None]
    return Rotary(angles.cos().to(device), angles.sin().to(device))


def _image_positions(frame: int, rows: int, columns: int) -> torch.Tensor:
    """Frame, row and column of each token: int64 [rows · columns, 3]."""
    row = torch.arange(rows) - (rows - rows // 2)
    column = torch.arange(columns) - (columns - columns // 2)
    frames = torch.full((rows * columns,), frame)
    return torch.stack([frames, row.repeat_interleave(columns), column.repeat(rows)], 1)


def _angles(positions: torch.Tensor, dim: int) -> torch.Tensor:
    """float32 [N, dim / 2]: position times θ^(−2i/dim)."""
    frequencies = 1.0 / torch.pow(THETA, torch.arange(0, dim, 2).float().div(dim))
    return torch.outer(positions.float(), frequencies)


def apply_rotary(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Rotate neighboring channels (x₀, x₁), (x₂, x₃) … of x [B, L, heads, head_dim] in float32; keeps x's dtype."""
    pairs = x.float().unflatten(-1, (-1, 2))
    rotated = torch.stack([-pairs[..., 1], pairs[..., 0]], dim=-1).flatten(-2)
    return (x.float() * cos + rotated * sin).to(x.dtype)
