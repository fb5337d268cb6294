"""From the q, k and v projections of text and image to attention's operands over both: normed, rotated, side by side.

Each head's q and k go through an RMS norm (QK-norm keeps the scores bounded) and are rotated by their positions (RoPE); then
text and image stand one after the other in one sequence. That is little arithmetic on much memory, so what counts is how often
each byte is moved: qwen_image/kernels/joint_kernels.py reads and writes it once, where Triton is. It also frees the
projections: the backward pass gets their normed values back from attention's own operands, since a rotation can be undone and
the norm's weight divided out.

LoRA updates of the projections may be left to it: added on the way by qwen_image/kernels/low_rank_kernels.py they cost no
pass over the projections of their own.
"""

from importlib.util import find_spec
from typing import NamedTuple

import torch

from qwen_image.model.layers import RMSNorm
from qwen_image.model.rotary import Rotary, apply_rotary

HAS_TRITON = find_spec("triton") is not None
if HAS_TRITON:
    from qwen_image.kernels import (
        joint_operators,  # noqa: F401  (registers them)
        low_rank_operators,
    )
HAS_LOW_RANK_KERNEL = HAS_TRITON

# Neighboring channels are rotated and rounded together, so dividing by the smaller of their two weights magnifies the
# larger one's rounding error by their ratio. Up to this root mean square of the ratios the gradients in bf16 are nearer to
# float64's than the plain operations' are (error 3e-3; weights e^N(0,1) have ratios of 4–7); beyond, projections are kept.
LARGEST_WEIGHT_RATIO = 8.0


class Norms(NamedTuple):
    """The RMS norms over a head's channels: the image's query and key, the text's query and key."""

    q: RMSNorm
    k: RMSNorm
    added_q: RMSNorm
    added_k: RMSNorm


class Updates(NamedTuple):
    """What the q, k and v of a stream still lack: scale · factors · upᵀ, part by part."""

    factors: torch.Tensor  # [B, L, n·r] for the n parts that there are, one after the other
    ups: tuple[torch.Tensor, ...]  # n matrices [D, r]
    scale: float


def joint_layout(
    image: torch.Tensor,
    text: torch.Tensor,
    norms: Norms,
    rotary: Rotary,
    keep: torch.Tensor | None,
    invertible: bool,
    updates: tuple[Updates, Updates] | None = None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Projections of both streams → query, key and value of the joint sequence [text, image], each [B, T + S, heads, dim].

    image [B, S, 3·D] holds q, k and v side by side, text [B, T, 3·D] too, or [B, T, 2·D] only k and v: then the query is
    the image's alone, [B, S, heads, dim]. Where `keep` (bool [B, T + S], or None) is False, text keys and values are 0.
    `invertible`: the norms' weights allow the backward pass to undo them (see `can_invert`).
    `updates`: of image and text, where `takes_updates` says that they may be left to this function.
    """
    weights = [norm.weight for norm in norms]
    if updates is not None:
        of_image, of_text = updates
        ups = [*of_image.ups, *[of_image.ups[0]] * (3 - len(of_text.ups)), *of_text.ups]
        query, key, value, _ = torch.ops.qwen_image.low_rank_layout(
            image.contiguous(),
            text.contiguous(),
            of_image.factors.contiguous(),
            of_text.factors.contiguous(),
            ups,
            weights,
            rotary.cos,
            rotary.sin,
            keep,
            of_image.scale,
        )
        return query, key, value
    if has_kernel(image, text, norms):
        query, key, value, _ = torch.ops.qwen_image.joint_layout(
            image.contiguous(), text.contiguous(), weights, rotary.cos, rotary.sin, keep, invertible
        )
        return query, key, value
    return plain_joint_layout(image, text, norms, rotary, keep)


def has_kernel(image: torch.Tensor, text: torch.Tensor, norms: Norms) -> bool:
    """Whether the kernels can do it: a GPU, Triton, frozen norms that are always there, a head size they can tile."""
    weights = [norm.weight for norm in norms]
    dim = weights[0].shape[0]
    trained = torch.is_grad_enabled() and any(weight.requires_grad for weight in weights)
    return (
        HAS_TRITON
        and not trained
        and image.is_cuda
        and image.dtype == text.dtype
        and image.dtype in (torch.bfloat16, torch.float16, torch.float32)
        and dim >= 16
        and dim & (dim - 1) == 0
        and all(weight.shape[0] == dim for weight in weights)
    )


def takes_updates(image: torch.Tensor, text: torch.Tensor, norms: Norms, invertible: bool, rank: int) -> bool:
    """Whether LoRA updates of `rank` may be left to `joint_layout`; image and text of the projections' dtype and device."""
    return (
        HAS_LOW_RANK_KERNEL
        and invertible
        and rank <= low_rank_operators.HIGHEST_RANK
        and has_kernel(image, text, norms)
        and norms.q.weight.shape[0] >= low_rank_operators.SMALLEST_PRODUCT
    )


def plain_joint_layout(
    image: torch.Tensor, text: torch.Tensor, norms: Norms, rotary: Rotary, keep: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The same in PyTorch's operations; the norms round to their weights' dtype in between."""
    text_tokens = text.shape[1]
    cos, sin = rotary
    dim = cos.shape[-1]
    inner = image.shape[2] // 3
    image_query, image_key, image_value = (x.unflatten(-1, (-1, dim)) for x in image.split(inner, -1))
    *text_query, text_key, text_value = (x.unflatten(-1, (-1, dim)) for x in text.split(inner, -1))
    key = torch.cat([norms.added_k(text_key), norms.k(image_key)], 1)
    value = torch.cat([text_value, image_value], 1)
    query = norms.q(image_query)
    if text_query:
        query = torch.cat([norms.added_q(text_query[0]), query], 1)
        query = apply_rotary(query, cos, sin)
    else:
        query = apply_rotary(query, cos[:, text_tokens:], sin[:, text_tokens:])
    key = apply_rotary(key, cos, sin)
    if keep is not None:
        kept = keep[..., None, None].to(key.dtype)
        key, value = key * kept, value * kept
    return query, key, value


def can_invert(norms: Norms) -> bool:
    """Whether the norms' weights can be divided out again well enough; waits for the device."""
    pairs = torch.stack([norm.weight.detach() for norm in norms]).float().abs().unflatten(-1, (-1, 2))
    ratios = pairs.amax(-1, keepdim=True) / pairs
    return bool((ratios.square().mean((1, 2)).sqrt() <= LARGEST_WEIGHT_RATIO).all())
