"""The joint layout as operators on CUDA tensors, with gradients; torch.compile sees through them to the kernels."""

from typing import Any

import torch
from torch.library import triton_op, wrap_triton

from qwen_image.kernels.joint_kernels import backward_kernel, forward_kernel
from qwen_image.model.layers import NORM_EPS

GROUP = 8  # heads a program
WARPS = 4


def _sizes(image: torch.Tensor, text: torch.Tensor, head_dim: int) -> tuple[int, bool]:
    """Number of heads, and whether the text has queries."""
    inner = image.shape[2] // 3
    return inner // head_dim, text.shape[2] == 3 * inner


def group_of(heads: int) -> int:
    """Heads a program: the largest power of two up to GROUP that divides `heads`."""
    return min(GROUP, heads & -heads)


@triton_op("qwen_image::joint_layout", mutates_args=())
def forward_op(
    image: torch.Tensor,
    text: torch.Tensor,
    norm_q: torch.Tensor,
    norm_k: torch.Tensor,
    norm_added_q: torch.Tensor,
    norm_added_k: torch.Tensor,
    cos: torch.Tensor,
    sin: torch.Tensor,
    keep: torch.Tensor | None,
    save: bool,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """As `joint_layout`; also the 1 / rms of q and k, float32 [B, L, 2, heads], if the backward pass shall `save` it."""
    query, key, value, scales = _empty_outputs(image, text, norm_q, save)
    batch, tokens, heads, dim = key.shape
    group = group_of(heads)
    wrap_triton(forward_kernel)[(tokens, batch, heads // group)](
        image,
        text,
        norm_q,
        norm_k,
        norm_added_q,
        norm_added_k,
        cos,
        sin,
        cos if keep is None else keep,
        query,
        key,
        value,
        scales,
        text.shape[1],
        image.shape[1],
        EPS=NORM_EPS,
        HEADS=heads,
        DIM=dim,
        GROUP=group,
        TEXT_QUERY=text.shape[2] == image.shape[2],
        KEEP=keep is not None,
        SAVE=save,
        num_warps=WARPS,
    )
    return query, key, value, scales


def _empty_outputs(
    image: torch.Tensor, text: torch.Tensor, norm_q: torch.Tensor, save: bool
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    heads, text_query = _sizes(image, text, norm_q.shape[0])
    batch, image_tokens, tokens = image.shape[0], image.shape[1], text.shape[1] + image.shape[1]
    shape = (batch, tokens, heads, norm_q.shape[0])
    query = image.new_empty((batch, tokens if text_query else image_tokens, *shape[2:]))
    scales = image.new_empty((batch, tokens if save else 0, 2, heads), dtype=torch.float32)
    return query, image.new_empty(shape), image.new_empty(shape), scales


@forward_op.register_fake
def _(
    image: torch.Tensor, text: torch.Tensor, norm_q: torch.Tensor, *others: Any
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    return _empty_outputs(image, text, norm_q, save=others[-1])


@triton_op("qwen_image::joint_layout_backward", mutates_args=())
def backward_op(
    grad_query: torch.Tensor,
    grad_key: torch.Tensor,
    grad_value: torch.Tensor,
    image: torch.Tensor | None,
    text: torch.Tensor | None,
    query: torch.Tensor | None,
    key: torch.Tensor | None,
    scales: torch.Tensor,
    norm_q: torch.Tensor,
    norm_k: torch.Tensor,
    norm_added_q: torch.Tensor,
    norm_added_k: torch.Tensor,
    cos: torch.Tensor,
    sin: torch.Tensor,
    keep: torch.Tensor | None,
    text_tokens: int,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Gradients of `image` and `text`, from what the forward pass read (image, text) or from what it made (query, key)."""
    grad_image, grad_text = _empty_gradients(grad_query, grad_key, text_tokens)
    batch, tokens, heads, dim = grad_key.shape
    group = group_of(heads)
    unused = grad_key
    wrap_triton(backward_kernel)[(tokens, batch, heads // group)](
        grad_query,
        grad_key,
        grad_value,
        unused if image is None else image,
        unused if text is None else text,
        unused if query is None else query,
        unused if key is None else key,
        scales,
        norm_q,
        norm_k,
        norm_added_q,
        norm_added_k,
        cos,
        sin,
        cos if keep is None else keep,
        grad_image,
        grad_text,
        text_tokens,
        tokens - text_tokens,
        EPS=NORM_EPS,
        HEADS=heads,
        DIM=dim,
        GROUP=group,
        TEXT_QUERY=grad_text.shape[2] == grad_image.shape[2],
        KEEP=keep is not None,
        SAVED=query is not None,
        num_warps=WARPS,
    )
    return grad_image, grad_text


def _empty_gradients(
    grad_query: torch.Tensor, grad_key: torch.Tensor, text_tokens: int
) -> tuple[torch.Tensor, torch.Tensor]:
    batch, tokens, heads, dim = grad_key.shape
    inner = heads * dim
    text_parts = 3 if grad_query.shape[1] == tokens else 2
    image_shape = (batch, tokens - text_tokens, 3 * inner)
    return grad_key.new_empty(image_shape), grad_key.new_empty((batch, text_tokens, text_parts * inner))


@backward_op.register_fake
def _(grad_query: torch.Tensor, grad_key: torch.Tensor, *others: Any) -> tuple[torch.Tensor, torch.Tensor]:
    return _empty_gradients(grad_query, grad_key, text_tokens=others[-1])


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Any, ...]) -> None:
    image, text, *constants, save = inputs
    query, key, _, scales = output
    # What attention keeps anyway, else the projections.
    ctx.save_for_backward(*((None, None, query, key) if save else (image, text, None, None)), scales, *constants)
    ctx.text_tokens = text.shape[1]
    ctx.mark_non_differentiable(scales)
    ctx.set_materialize_grads(True)


def _backward(
    ctx: Any, grad_query: torch.Tensor, grad_key: torch.Tensor, grad_value: torch.Tensor, _: Any
) -> tuple[torch.Tensor | None, ...]:
    grads = (each.contiguous() for each in (grad_query, grad_key, grad_value))
    image, text = torch.ops.qwen_image.joint_layout_backward(*grads, *ctx.saved_tensors, ctx.text_tokens)
    return (image, text, *[None] * 8)


forward_op.register_autograd(_backward, setup_context=_save)
