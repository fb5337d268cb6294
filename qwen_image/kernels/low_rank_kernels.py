"""Triton kernels of the joint layout that add the projections' LoRA updates on the way, and take their gradients back.

As qwen_image/kernels/joint_kernels.py, but a program handles BLOCK tokens of one stream's q, k or v, head after head,
because small matrix products want several rows: factors [tokens, RANK] · up [DIM, RANK]ᵀ is added to a head after it was
read, and backwards gradient [tokens, DIM] · up is summed over heads before it is forgotten. Products of their own would
read and write the projections once more. Sums have a fixed order, so that a resumed run repeats every bit.
"""

# mypy: ignore-errors
import triton
import triton.language as tl

from qwen_image.kernels.norm_parts import inverse_rms, inverse_weight


@triton.jit
def _program():
    """A program's sample, which of q, k and v (0, 1, 2) it makes, and its group of heads."""
    return tl.program_id(1).to(tl.int64), tl.program_id(2) % 3, tl.program_id(2) // 3


@triton.jit
def _stream(part, text_tokens, image_tokens, BLOCK: tl.constexpr, TEXT_QUERY: tl.constexpr):
    """Whether a program's tokens are the text's, and their places there, [BLOCK], of which those below `length` exist.

    Also the stream's first row in the joint sequence, and which of how many parts of its projection the program takes.
    """
    block = tl.program_id(0)
    text_blocks = tl.cdiv(text_tokens, BLOCK)
    is_text = block < text_blocks
    if is_text:
        # Without the text's query its first part is k, and a program for q finds no token inside.
        length, offset, own, parts = text_tokens, 0, part + TEXT_QUERY - 1, 2 + TEXT_QUERY
    else:
        block -= text_blocks
        length, offset, own, parts = image_tokens, text_tokens, part, 3
    return is_text, block * BLOCK + tl.arange(0, BLOCK), length, offset, own, parts


@triton.jit
def _chosen(is_text, part, q, k, v, added_q, added_k, added_v):
    """What is read for a part of a stream. For pointers that are only read: the compiler takes all six for equal."""
    if is_text:
        chosen = added_v
        if part == 0:
            chosen = added_q
        if part == 1:
            chosen = added_k
    else:
        chosen = v
        if part == 0:
            chosen = q
        if part == 1:
            chosen = k
    return chosen


@triton.jit
def _pairs(x, BLOCK: tl.constexpr, DIM: tl.constexpr):
    """[BLOCK, DIM] → the even channels and the odd ones."""
    return tl.split(tl.reshape(x, [BLOCK, DIM // 2, 2]))


@triton.jit
def _joined(even, odd, BLOCK: tl.constexpr, DIM: tl.constexpr):
    return tl.reshape(tl.join(even, odd), [BLOCK, DIM])


@triton.jit
def _angles(cos, sin, token, inside, BLOCK: tl.constexpr, DIM: tl.constexpr):
    """cos and sin of each pair of channels, [BLOCK, DIM / 2]: neighbors share an angle."""
    place = token[:, None] * DIM + tl.arange(0, DIM)[None, :]
    cosine, _ = _pairs(tl.load(cos + place, mask=inside[:, None], other=0.0), BLOCK, DIM)
    sine, _ = _pairs(tl.load(sin + place, mask=inside[:, None], other=0.0), BLOCK, DIM)
    return cosine, sine


@triton.jit
def _norm_weight(norm, DIM: tl.constexpr):
    """A norm's weight for even and odd channels, float32 [1, DIM / 2]."""
    even, odd = tl.split(tl.reshape(tl.load(norm + tl.arange(0, DIM)).to(tl.float32), [1, DIM // 2, 2]))
    return even, odd


@triton.jit
def _up(up, head, DIM: tl.constexpr, RANK: tl.constexpr, LANES: tl.constexpr):
    """[DIM, LANES]: the rows of lora_B that make one head."""
    lane = tl.arange(0, LANES)[None, :]
    return tl.load(up + (head * DIM + tl.arange(0, DIM))[:, None] * RANK + lane, mask=lane < RANK, other=0.0)


@triton.jit
def _updated(source, inside, factors, up, scale, head, DIM: tl.constexpr, RANK: tl.constexpr, LANES: tl.constexpr):
    """A head of a projection with its update, [BLOCK, DIM] in float32."""
    base = tl.load(source, mask=inside[:, None], other=0.0).to(tl.float32)
    return base + scale * tl.dot(factors, tl.trans(_up(up, head, DIM, RANK, LANES)), input_precision="ieee")


@triton.jit(do_not_specialize=["scale", "text_tokens", "image_tokens"])
def forward_kernel(
    image,
    text,
    image_factors,
    text_factors,
    up_q,
    up_k,
    up_v,
    up_added_q,
    up_added_k,
    up_added_v,
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
    scale,
    text_tokens,
    image_tokens,
    EPS: tl.constexpr,
    HEADS: tl.constexpr,
    DIM: tl.constexpr,
    RANK: tl.constexpr,
    LANES: tl.constexpr,
    BLOCK: tl.constexpr,
    HEADS_HERE: tl.constexpr,
    TEXT_QUERY: tl.constexpr,
    KEEP: tl.constexpr,
):
    INNER: tl.constexpr = HEADS * DIM
    scale = tl.cast(scale, tl.float32)  # torch's compiler passes a float64
    sample, part, group = _program()
    is_text, place, length, offset, own, parts = _stream(part, text_tokens, image_tokens, BLOCK, TEXT_QUERY)
    up = _chosen(is_text, part, up_q, up_k, up_v, up_added_q, up_added_k, up_added_v)
    norm = _chosen(is_text, part, norm_q, norm_k, norm_k, norm_added_q, norm_added_k, norm_added_k)
    if is_text:
        source, factors = text, text_factors
    else:
        source, factors = image, image_factors
    inside = (place < length) & (own >= 0)
    row = sample * (text_tokens + image_tokens) + offset + place
    target = value
    target_row = row
    if part == 0:
        target = query
        if not TEXT_QUERY:
            target_row = sample * image_tokens + place
    if part == 1:
        target = key
    own_row = sample * length + place
    lane = tl.arange(0, LANES)[None, :]
    factors += own_row[:, None] * (parts * RANK) + own * RANK + lane
    factors = tl.load(factors, mask=inside[:, None] & (lane < RANK), other=0.0)
    column = group * HEADS_HERE * DIM + tl.arange(0, DIM)[None, :]
    source += own_row[:, None] * (parts * INNER) + own * INNER + column
    target += target_row[:, None] * INNER + column
    kept = inside
    if KEEP:
        kept = (tl.load(keep + row, mask=inside, other=0) != 0) | (part == 0)
    if part == 2:
        for number in range(HEADS_HERE):
            head = group * HEADS_HERE + number
            x = _updated(source + number * DIM, inside, factors, up, scale, head, DIM, RANK, LANES)
            if KEEP:
                x = tl.where(kept[:, None], x, 0.0)
            tl.store(target + number * DIM, x.to(target.dtype.element_ty), mask=inside[:, None])
    else:
        cosine, sine = _angles(cos, sin, offset + place, inside, BLOCK, DIM)
        even_weight, odd_weight = _norm_weight(norm, DIM)
        for number in range(HEADS_HERE):
            head = group * HEADS_HERE + number
            x = _updated(source + number * DIM, inside, factors, up, scale, head, DIM, RANK, LANES)
            rms = inverse_rms(x, DIM, EPS)
            even, odd = _pairs(x * rms[:, None], BLOCK, DIM)
            even, odd = even * even_weight, odd * odd_weight
            x = _joined(even * cosine - odd * sine, odd * cosine + even * sine, BLOCK, DIM)
            if KEEP:  # last, so that padding is 0 whatever it was
                x = tl.where(kept[:, None], x, 0.0)
            tl.store(target + number * DIM, x.to(target.dtype.element_ty), mask=inside[:, None])
            tl.store(scales + row * (2 * HEADS) + part * HEADS + head, rms, mask=inside)


@triton.jit(do_not_specialize=["scale", "text_tokens", "image_tokens"])
def backward_kernel(
    grad_query,
    grad_key,
    grad_value,
    query,
    key,
    scales,
    up_q,
    up_k,
    up_v,
    up_added_q,
    up_added_k,
    up_added_v,
    norm_q,
    norm_k,
    norm_added_q,
    norm_added_k,
    cos,
    sin,
    keep,
    grad_image,
    grad_text,
    of_image_factors,  # float32, a sum over HEADS_HERE heads for each group of them
    of_text_factors,
    scale,
    text_tokens,
    image_tokens,
    HEADS: tl.constexpr,
    DIM: tl.constexpr,
    RANK: tl.constexpr,
    LANES: tl.constexpr,
    BLOCK: tl.constexpr,
    HEADS_HERE: tl.constexpr,
    TEXT_QUERY: tl.constexpr,
    KEEP: tl.constexpr,
):
    INNER: tl.constexpr = HEADS * DIM
    dtype: tl.constexpr = grad_image.dtype.element_ty
    scale = tl.cast(scale, tl.float32)  # torch's compiler passes a float64
    sample, part, group = _program()
    is_text, place, length, offset, own, parts = _stream(part, text_tokens, image_tokens, BLOCK, TEXT_QUERY)
    up = _chosen(is_text, part, up_q, up_k, up_v, up_added_q, up_added_k, up_added_v)
    norm = _chosen(is_text, part, norm_q, norm_k, norm_k, norm_added_q, norm_added_k, norm_added_k)
    if is_text:
        target, of_factors = grad_text, of_text_factors
    else:
        target, of_factors = grad_image, of_image_factors
    inside = (place < length) & (own >= 0)
    row = sample * (text_tokens + image_tokens) + offset + place
    grad, result = grad_value, key
    source_row = row
    if part == 0:
        grad, result = grad_query, query
        if not TEXT_QUERY:
            source_row = sample * image_tokens + place
    if part == 1:
        grad = grad_key
    own_row = sample * length + place
    column = group * HEADS_HERE * DIM + tl.arange(0, DIM)[None, :]
    grad += source_row[:, None] * INNER + column
    result += source_row[:, None] * INNER + column
    target += own_row[:, None] * (parts * INNER) + own * INNER + column
    kept = inside
    if KEEP:
        kept = inside & ((tl.load(keep + row, mask=inside, other=0) != 0) | (part == 0))
    total = tl.zeros([BLOCK, LANES], tl.float32)
    if part == 2:
        for number in range(HEADS_HERE):
            g = tl.load(grad + number * DIM, mask=kept[:, None], other=0.0)
            tl.store(target + number * DIM, g, mask=inside[:, None])
            total = tl.dot(g, _up(up, group * HEADS_HERE + number, DIM, RANK, LANES), total, input_precision="ieee")
    else:
        cosine, sine = _angles(cos, sin, offset + place, inside, BLOCK, DIM)
        even_weight, odd_weight = _norm_weight(norm, DIM)
        even_inverse, odd_inverse = inverse_weight(even_weight), inverse_weight(odd_weight)
        for number in range(HEADS_HERE):
            head = group * HEADS_HERE + number
            g = tl.load(grad + number * DIM, mask=kept[:, None], other=0.0).to(tl.float32)
            x = tl.load(result + number * DIM, mask=inside[:, None], other=0.0).to(tl.float32)
            rms = tl.load(scales + row * (2 * HEADS) + part * HEADS + head, mask=inside, other=0.0)
            # Rotate both back; x is then what was normed.
            even, odd = _pairs(x, BLOCK, DIM)
            even, odd = (even * cosine + odd * sine) * even_inverse, (odd * cosine - even * sine) * odd_inverse
            even_grad, odd_grad = _pairs(g, BLOCK, DIM)
            even_grad, odd_grad = (
                (even_grad * cosine + odd_grad * sine) * even_weight,
                (odd_grad * cosine - even_grad * sine) * odd_weight,
            )
            mean = tl.sum(even * even_grad + odd * odd_grad, 1) / DIM
            even = (even_grad - even * mean[:, None]) * rms[:, None]
            odd = (odd_grad - odd * mean[:, None]) * rms[:, None]
            x = _joined(even, odd, BLOCK, DIM).to(dtype)
            tl.store(target + number * DIM, x, mask=inside[:, None])
            total = tl.dot(x, _up(up, head, DIM, RANK, LANES), total, input_precision="ieee")
    lane = tl.arange(0, LANES)[None, :]
    rows = (group * tl.num_programs(1) + sample) * length + place
    of_factors += rows[:, None] * (parts * RANK) + own * RANK + lane
    tl.store(of_factors, total * scale, mask=inside[:, None] & (lane < RANK))
