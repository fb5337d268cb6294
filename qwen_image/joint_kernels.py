"""Triton kernels behind qwen_image/joint_layout.py, forward and backward, as operators that torch.compile sees through.

One program handles one token and GROUP heads of q, k and v: each byte is read and written once. Arithmetic is float32
throughout, rounded once at the end.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch.library import triton_op, wrap_triton

from qwen_image.layers import NORM_EPS

GROUP = 8  # heads a program
WARPS = 4


@triton.jit
def _quarter_turn(x, GROUP: tl.constexpr, DIM: tl.constexpr):
    """(x₀, x₁) → (−x₁, x₀) in each pair of neighbouring channels."""
    even, odd = tl.split(tl.reshape(x, [GROUP, DIM // 2, 2]))
    return tl.reshape(tl.join(-odd, even), [GROUP, DIM])


@triton.jit
def _norm_backward(grad, normed, scale, weight, DIM: tl.constexpr):
    """The gradient of x in x · scale · weight, with scale = 1 / rms(x) and normed = x · scale."""
    grad = grad * weight
    mean = tl.sum(grad * normed, 1) / DIM
    return (grad - normed * mean[:, None]) * scale[:, None]


@triton.jit(do_not_specialize=["text_tokens", "image_tokens"])
def forward_kernel(
    image,
    text,
    norm_q,
    norm_k,
    norm_added_q,
    norm_added_k,
    cos,
    sin,
    keep,
    query,
    key,
    value,
    scales,
    text_tokens,
    image_tokens,
    EPS: tl.constexpr,
    HEADS: tl.constexpr,
    DIM: tl.constexpr,
    GROUP: tl.constexpr,
    TEXT_QUERY: tl.constexpr,
    KEEP: tl.constexpr,
    SAVE: tl.constexpr,
):
    INNER: tl.constexpr = HEADS * DIM
    TEXT_WIDTH: tl.constexpr = (2 + TEXT_QUERY) * INNER
    token = tl.program_id(0)
    sample = tl.program_id(1).to(tl.int64)
    row = sample * (text_tokens + image_tokens) + token
    head = tl.program_id(2) * GROUP + tl.arange(0, GROUP)
    # One row a head although all rows are equal: each thread then loads what it needs, and none waits for another.
    channel = tl.zeros([GROUP, 1], tl.int32) + tl.arange(0, DIM)[None, :]
    tile = head[:, None] * DIM + channel
    cosine = tl.load(cos + token * DIM + channel)
    sine = tl.load(sin + token * DIM + channel)
    is_text = token < text_tokens
    if is_text:
        source = text + (sample * text_tokens + token) * TEXT_WIDTH + tile
        k = tl.load(source + (TEXT_WIDTH - 2 * INNER))
        v = tl.load(source + (TEXT_WIDTH - INNER))
        q = k
        if TEXT_QUERY:
            q = tl.load(source)
        q_weight = tl.load(norm_added_q + channel)
        k_weight = tl.load(norm_added_k + channel)
    else:
        source = image + (sample * image_tokens + token - text_tokens) * (3 * INNER) + tile
        q = tl.load(source)
        k = tl.load(source + INNER)
        v = tl.load(source + 2 * INNER)
        q_weight = tl.load(norm_q + channel)
        k_weight = tl.load(norm_k + channel)
    q = q.to(tl.float32)
    k = k.to(tl.float32)
    q_scale = tl.rsqrt(tl.sum(q * q, 1) / DIM + EPS)
    k_scale = tl.rsqrt(tl.sum(k * k, 1) / DIM + EPS)
    q = q * q_scale[:, None] * q_weight.to(tl.float32)
    k = k * k_scale[:, None] * k_weight.to(tl.float32)
    q = q * cosine + _quarter_turn(q, GROUP, DIM) * sine
    k = k * cosine + _quarter_turn(k, GROUP, DIM) * sine
    if KEEP:
        kept = tl.load(keep + row) != 0
        k = tl.where(kept, k, 0.0)
        v = tl.where(kept, v, tl.zeros_like(v))
    tl.store(key + row * INNER + tile, k.to(key.dtype.element_ty))
    tl.store(value + row * INNER + tile, v)
    if TEXT_QUERY:
        tl.store(query + row * INNER + tile, q.to(query.dtype.element_ty))
    else:
        if token >= text_tokens:
            place = sample * image_tokens + token - text_tokens
            tl.store(query + place * INNER + tile, q.to(query.dtype.element_ty))
    if SAVE:
        tl.store(scales + row * (2 * HEADS) + head, q_scale)
        tl.store(scales + row * (2 * HEADS) + HEADS + head, k_scale)


@triton.jit(do_not_specialize=["text_tokens", "image_tokens"])
def backward_kernel(
    grad_query,
    grad_key,
    grad_value,
    image,  # the projections, or with SAVED (query, key): nothing
    text,
    query,
    key,
    scales,
    norm_q,
    norm_k,
    norm_added_q,
    norm_added_k,
    cos,
    sin,
    keep,
    grad_image,
    grad_text,
    text_tokens,
    image_tokens,
    EPS: tl.constexpr,
    HEADS: tl.constexpr,
    DIM: tl.constexpr,
    GROUP: tl.constexpr,
    TEXT_QUERY: tl.constexpr,
    KEEP: tl.constexpr,
    SAVED: tl.constexpr,
):
    INNER: tl.constexpr = HEADS * DIM
    TEXT_WIDTH: tl.constexpr = (2 + TEXT_QUERY) * INNER
    token = tl.program_id(0)
    sample = tl.program_id(1).to(tl.int64)
    row = sample * (text_tokens + image_tokens) + token
    head = tl.program_id(2) * GROUP + tl.arange(0, GROUP)
    # One row a head although all rows are equal: each thread then loads what it needs, and none waits for another.
    channel = tl.zeros([GROUP, 1], tl.int32) + tl.arange(0, DIM)[None, :]
    tile = head[:, None] * DIM + channel
    cosine = tl.load(cos + token * DIM + channel)
    sine = tl.load(sin + token * DIM + channel)
    is_text = token < text_tokens
    dk = tl.load(grad_key + row * INNER + tile)
    dv = tl.load(grad_value + row * INNER + tile)
    if KEEP:
        kept = tl.load(keep + row) != 0
        dk = tl.where(kept, dk, tl.zeros_like(dk))
        dv = tl.where(kept, dv, tl.zeros_like(dv))
    text_row = (sample * text_tokens + token) * TEXT_WIDTH + tile
    image_row = (sample * image_tokens + token - text_tokens) * (3 * INNER) + tile
    query_row = row
    if not TEXT_QUERY:  # a text token then computes with its key's numbers, and stores nothing
        query_row = sample * image_tokens + tl.maximum(token - text_tokens, 0)
    dq = tl.load(grad_query + query_row * INNER + tile)
    if is_text:
        q_weight = tl.load(norm_added_q + channel)
        k_weight = tl.load(norm_added_k + channel)
    else:
        q_weight = tl.load(norm_q + channel)
        k_weight = tl.load(norm_k + channel)
    q_weight = q_weight.to(tl.float32)
    k_weight = k_weight.to(tl.float32)
    if SAVED:
        q = tl.load(query + query_row * INNER + tile).to(tl.float32)
        k = tl.load(key + row * INNER + tile).to(tl.float32)
        q_scale = tl.load(scales + row * (2 * HEADS) + head)
        k_scale = tl.load(scales + row * (2 * HEADS) + HEADS + head)
        # Rotate back, divide the weight out; a channel with weight 0 gets no gradient from the mean.
        q = q * cosine - _quarter_turn(q, GROUP, DIM) * sine
        k = k * cosine - _quarter_turn(k, GROUP, DIM) * sine
        q = q * tl.where(q_weight == 0.0, 0.0, 1.0 / q_weight)
        k = k * tl.where(k_weight == 0.0, 0.0, 1.0 / k_weight)
    else:
        if is_text:
            k = tl.load(text + text_row + (TEXT_WIDTH - 2 * INNER))
            q = k
            if TEXT_QUERY:
                q = tl.load(text + text_row)
        else:
            q = tl.load(image + image_row)
            k = tl.load(image + image_row + INNER)
        q = q.to(tl.float32)
        k = k.to(tl.float32)
        q_scale = tl.rsqrt(tl.sum(q * q, 1) / DIM + EPS)
        k_scale = tl.rsqrt(tl.sum(k * k, 1) / DIM + EPS)
        q = q * q_scale[:, None]
        k = k * k_scale[:, None]
    dq = dq.to(tl.float32)
    dk = dk.to(tl.float32)
    dq = dq * cosine - _quarter_turn(dq, GROUP, DIM) * sine
    dk = dk * cosine - _quarter_turn(dk, GROUP, DIM) * sine
    dq = _norm_backward(dq, q, q_scale, q_weight, DIM).to(grad_image.dtype.element_ty)
    dk = _norm_backward(dk, k, k_scale, k_weight, DIM).to(grad_image.dtype.element_ty)
    if is_text:
        if TEXT_QUERY:
            tl.store(grad_text + text_row, dq)
        tl.store(grad_text + text_row + (TEXT_WIDTH - 2 * INNER), dk)
        tl.store(grad_text + text_row + (TEXT_WIDTH - INNER), dv)
    else:
        tl.store(grad_image + image_row, dq)
        tl.store(grad_image + image_row + INNER, dk)
        tl.store(grad_image + image_row + 2 * INNER, dv)


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
    return _empty_outputs(image, text, norm_q, save)


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
def _(
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
    return _empty_gradients(grad_query, grad_key, text_tokens)


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
