"""Triton kernels of the joint layout (qwen_image/model/joint_layout.py), forward and backward.

One program handles one token and GROUP heads of q, k and v: each byte is read and written once. Arithmetic is float32
throughout, rounded once at the end. Both take the projections of B samples with `text_tokens` + `image_tokens` tokens,
a sample's heads one after the other; only the lengths may change without another compilation.
"""

# mypy: ignore-errors
import triton
import triton.language as tl

from qwen_image.kernels.norm_parts import inverse_rms, inverse_weight


@triton.jit
def _tile(GROUP: tl.constexpr, DIM: tl.constexpr):
    """Of a program's heads: their numbers [GROUP], their channels' and those within a token, both [GROUP, DIM]."""
    head = tl.program_id(2) * GROUP + tl.arange(0, GROUP)
    # One row a head although all rows are equal: each thread then loads what it needs, and none waits for another.
    channel = tl.zeros([GROUP, 1], tl.int32) + tl.arange(0, DIM)[None, :]
    return head, channel, head[:, None] * DIM + channel


@triton.jit
def _quarter_turn(x, GROUP: tl.constexpr, DIM: tl.constexpr):
    """(x₀, x₁) → (−x₁, x₀) in each pair of neighboring channels."""
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
    head, channel, tile = _tile(GROUP, DIM)
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
    q_scale = inverse_rms(q, DIM, EPS)
    k_scale = inverse_rms(k, DIM, EPS)
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
    head, channel, tile = _tile(GROUP, DIM)
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
        # Rotate back, divide the weight out.
        q = q * cosine - _quarter_turn(q, GROUP, DIM) * sine
        k = k * cosine - _quarter_turn(k, GROUP, DIM) * sine
        q = q * inverse_weight(q_weight)
        k = k * inverse_weight(k_weight)
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
        q_scale = inverse_rms(q, DIM, EPS)
        k_scale = inverse_rms(k, DIM, EPS)
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
