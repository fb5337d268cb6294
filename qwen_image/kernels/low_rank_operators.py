"""The joint layout with LoRA updates added on the way, as operators on CUDA tensors with gradients.

Tile sizes by timing on an H100 at 4,224 tokens, 24 heads of 128, rank 32 (bench/LOG.md).
"""

from typing import Any, NamedTuple

import torch
from torch.library import triton_op, wrap_triton

from qwen_image.kernels.layout_shapes import NORM_EPS, constants, empty_gradients, empty_outputs, heads_a_program
from qwen_image.kernels.low_rank_kernels import backward_kernel, forward_kernel


class Tiles(NamedTuple):
    """How much a program does: `block` tokens of `heads` heads at most, one after the other."""

    block: int
    warps: int
    stages: int
    heads: int

    def constants(self, rank: int, heads: int) -> dict[str, int]:
        """What a kernel is compiled for: a LoRA of `rank` and so many heads a program."""
        return {"BLOCK": self.block, "HEADS_HERE": heads, "RANK": rank, "LANES": lanes(rank)}

    def blocks(self, text_tokens: int, image_tokens: int) -> int:
        return (text_tokens + self.block - 1) // self.block + (image_tokens + self.block - 1) // self.block


FORWARD, BACKWARD = Tiles(32, 4, 3, 8), Tiles(32, 4, 3, 8)
SMALLEST_PRODUCT = 16  # the narrowest product that Triton compiles
HIGHEST_RANK = 64  # beyond, the tiles take more registers than there are


def lanes(rank: int) -> int:
    """Width of the tiles that hold `rank` columns: a power of two."""
    return max(SMALLEST_PRODUCT, 1 << (rank - 1).bit_length())


@triton_op("qwen_image::low_rank_layout", mutates_args=())
def forward_op(
    image: torch.Tensor,
    text: torch.Tensor,
    image_factors: torch.Tensor,
    text_factors: torch.Tensor,
    ups: list[torch.Tensor],
    norms: list[torch.Tensor],
    cos: torch.Tensor,
    sin: torch.Tensor,
    keep: torch.Tensor | None,
    scale: float,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Query, key, value [B, L, heads, dim], and the 1 / rms of q and k, float32 [B, L, 2, heads].

    image [B, S, 3·D] and text [B, T, 3·D or 2·D] lack `scale` · factors · upᵀ for q, k and v: factors are [B, S, 3·r] and
    [B, T, 3·r or 2·r], `ups` six matrices [D, r], the image's first (where the text has no query, the fourth is not read).
    """
    outputs = empty_outputs(image, text, norms[0].shape[0])
    batch, _, heads, dim = outputs[1].shape
    here, rank = heads_a_program(heads, FORWARD.heads), ups[0].shape[1]
    wrap_triton(forward_kernel)[(FORWARD.blocks(text.shape[1], image.shape[1]), batch, 3 * heads // here)](
        image,
        text,
        image_factors,
        text_factors,
        *ups,
        *norms,
        cos,
        sin,
        cos if keep is None else keep,
        *outputs,
        scale,
        text.shape[1],
        image.shape[1],
        EPS=NORM_EPS,
        **FORWARD.constants(rank, here),
        **constants(heads, dim, image, text, keep),
        num_warps=FORWARD.warps,
        num_stages=FORWARD.stages,
    )
    return outputs


@forward_op.register_fake
def _(
    image: torch.Tensor, text: torch.Tensor, _i: Any, _t: Any, _u: Any, norms: list[torch.Tensor], *others: Any
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    return empty_outputs(image, text, norms[0].shape[0])


def _empty_gradients(
    grad_query: torch.Tensor, grad_key: torch.Tensor, rank: int, text_tokens: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Of image and text, and of their factors a sum over some heads each."""
    image, text = empty_gradients(grad_query, grad_key, text_tokens)
    heads, dim = grad_key.shape[2:]
    groups = heads // heads_a_program(heads, BACKWARD.heads)
    of_image, of_text = (
        each.new_empty((groups, *each.shape[:2], each.shape[2] // (heads * dim) * rank), dtype=torch.float32)
        for each in (image, text)
    )
    return image, text, of_image, of_text


@triton_op("qwen_image::low_rank_layout_backward", mutates_args=())
def backward_op(
    grad_query: torch.Tensor,
    grad_key: torch.Tensor,
    grad_value: torch.Tensor,
    query: torch.Tensor,
    key: torch.Tensor,
    scales: torch.Tensor,
    ups: list[torch.Tensor],
    norms: list[torch.Tensor],
    cos: torch.Tensor,
    sin: torch.Tensor,
    keep: torch.Tensor | None,
    scale: float,
    text_tokens: int,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Gradients of `image` and `text`, and of their factors, float32 [groups of heads, B, S or T, Σr], still to be summed."""
    rank = ups[0].shape[1]
    grads = _empty_gradients(grad_query, grad_key, rank, text_tokens)
    batch, tokens, heads, dim = grad_key.shape
    here = heads_a_program(heads, BACKWARD.heads)
    wrap_triton(backward_kernel)[(BACKWARD.blocks(text_tokens, tokens - text_tokens), batch, 3 * heads // here)](
        grad_query,
        grad_key,
        grad_value,
        query,
        key,
        scales,
        *ups,
        *norms,
        cos,
        sin,
        cos if keep is None else keep,
        *grads,
        scale,
        text_tokens,
        tokens - text_tokens,
        **BACKWARD.constants(rank, here),
        **constants(heads, dim, *grads[:2], keep),
        num_warps=BACKWARD.warps,
        num_stages=BACKWARD.stages,
    )
    return grads


@backward_op.register_fake
def _(
    grad_query: torch.Tensor, grad_key: torch.Tensor, _v: Any, _q: Any, _k: Any, _s: Any, ups: Any, *others: Any
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    return _empty_gradients(grad_query, grad_key, ups[0].shape[1], text_tokens=others[-1])


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Any, ...]) -> None:
    _, text, image_factors, text_factors, ups, norms, cos, sin, keep, scale = inputs
    query, key, _, scales = output
    ctx.save_for_backward(query, key, scales, image_factors, text_factors, cos, sin, keep, *ups, *norms)
    ctx.ups, ctx.scale, ctx.text_tokens = len(ups), scale, text.shape[1]
    ctx.mark_non_differentiable(scales)
    ctx.set_materialize_grads(True)


def of_ups(gradient: torch.Tensor, factors: torch.Tensor, rank: int, scale: float) -> list[torch.Tensor]:
    """gradient [B, L, n·D] and factors [B, L, n·r] of n layers → the gradient of each one's up matrix [D, r]."""
    parts = factors.shape[2] // rank
    layers = gradient.flatten(0, 1).unflatten(1, (parts, -1)).permute(1, 2, 0)
    products = torch.bmm(layers, factors.flatten(0, 1).unflatten(1, (parts, rank)).transpose(0, 1))
    return list((products if scale == 1 else products * scale).unbind())


def _backward(
    ctx: Any, grad_query: torch.Tensor, grad_key: torch.Tensor, grad_value: torch.Tensor, _: Any
) -> tuple[Any, ...]:
    query, key, scales, image_factors, text_factors, cos, sin, keep, *matrices = ctx.saved_tensors
    ups, norms = matrices[: ctx.ups], matrices[ctx.ups :]
    grads = [each.contiguous() for each in (grad_query, grad_key, grad_value)]
    image, text, *sums = torch.ops.qwen_image.low_rank_layout_backward(
        *grads, query, key, scales, ups, norms, cos, sin, keep, ctx.scale, ctx.text_tokens
    )
    of_image_factors, of_text_factors = (each.sum(0).to(image.dtype) for each in sums)
    rank = ups[0].shape[1]
    of_image_ups = of_ups(image, image_factors, rank, ctx.scale)
    of_text_ups = of_ups(text, text_factors, rank, ctx.scale)
    of_all = [*of_image_ups, *[None] * (6 - len(of_image_ups) - len(of_text_ups)), *of_text_ups]
    return image, text, of_image_factors, of_text_factors, of_all, [None] * len(norms), None, None, None, None


forward_op.register_autograd(_backward, setup_context=_save)
