"""Triton kernels of GELU with float8 quantization (qwen_image/float8/mlp.py): a row a program, each byte moved once.

A row stays in registers between finding its largest value and dividing by it, as two tiles of powers of two: 12288 is
8192 + 4096, and masked lanes (a quarter of 16384) would cost as much arithmetic as others. Arithmetic is float32
throughout, rounded once at the end. The number of rows is the grid's alone.

The tanh approximation in sigmoids: ½·(1 + tanh u) = σ(2u), so gelu(y) = y·σ(2u) with 2u = 2·√(2/π)·(y + 0.044715·y³), which
cancels nothing where y is negative. Its derivative is σ + y·σ·(1 − σ)·2u'.
"""

# mypy: ignore-errors
import math

import triton
import triton.language as tl

LINEAR = tl.constexpr(2 * math.sqrt(2 / math.pi))  # 2u = LINEAR·y + CUBIC·y³
CUBIC = tl.constexpr(2 * math.sqrt(2 / math.pi) * 0.044715)
THRICE_CUBIC = tl.constexpr(6 * math.sqrt(2 / math.pi) * 0.044715)
LINEAR_LOG2 = tl.constexpr(-2 * math.sqrt(2 / math.pi) / math.log(2))  # −2u / ln 2, for the power of two
CUBIC_LOG2 = tl.constexpr(-2 * math.sqrt(2 / math.pi) * 0.044715 / math.log(2))


@triton.jit
def _larger(left, right):
    """The larger of the two, or NaN if one is."""
    return tl.maximum(left, right, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def _place(FIRST: tl.constexpr, SECOND: tl.constexpr):
    """A program's row, and the columns of its two tiles."""
    # From the last row on: the product before wrote it last, so it is still in the cache; the product after begins with row 0.
    row = (tl.num_programs(0) - 1 - tl.program_id(0)).to(tl.int64)
    return row, tl.arange(0, FIRST), FIRST + tl.arange(0, SECOND)


@triton.jit
def _load(row, column, WIDTH: tl.constexpr, MASKED: tl.constexpr):
    if MASKED:
        return tl.load(row + column, mask=column < WIDTH, other=0.0)
    else:
        return tl.load(row + column)


@triton.jit
def _gelu(y):
    y = y.to(tl.float32)
    return y / (1.0 + tl.exp2(y * (LINEAR_LOG2 + CUBIC_LOG2 * (y * y))))


@triton.jit
def _gelu_gradient(grad, y, scale):
    """grad · gelu'(y) · scale."""
    y = y.to(tl.float32)
    square = y * y
    sigmoid = 1.0 / (1.0 + tl.exp2(y * (LINEAR_LOG2 + CUBIC_LOG2 * square)))
    slope = sigmoid + y * (sigmoid - sigmoid * sigmoid) * (LINEAR + THRICE_CUBIC * square)
    return grad.to(tl.float32) * slope * scale


@triton.jit
def _store_quantized(
    first,
    second,
    values,
    scales,
    row,
    left,
    right,
    WIDTH: tl.constexpr,
    MASKED: tl.constexpr,
    LARGEST: tl.constexpr,
    SMALLEST_SCALE: tl.constexpr,
):
    """A row's two tiles, divided by one scale."""
    # Folded to the second's size within each thread: one reduction over the threads instead of two.
    folded = tl.reduce(tl.reshape(tl.abs(first), [first.shape[0] // second.shape[0], second.shape[0]]), 0, _larger)
    largest = tl.reduce(_larger(folded, tl.abs(second)), 0, _larger)
    scale = _larger(tl.div_rn(largest, LARGEST), SMALLEST_SCALE)
    inverse = tl.div_rn(1.0, scale)
    values += row * WIDTH
    tl.store(values + left, (first * inverse).to(values.dtype.element_ty))
    if MASKED:
        tl.store(values + right, (second * inverse).to(values.dtype.element_ty), mask=right < WIDTH)
    else:
        tl.store(values + right, (second * inverse).to(values.dtype.element_ty))
    tl.store(scales + row, scale)


@triton.jit
def gelu_kernel(
    y,
    values,
    scales,
    WIDTH: tl.constexpr,
    FIRST: tl.constexpr,
    SECOND: tl.constexpr,
    LARGEST: tl.constexpr,
    SMALLEST_SCALE: tl.constexpr,
):
    """gelu(y) quantized. FIRST + SECOND ≥ WIDTH > FIRST ≥ SECOND, both powers of two."""
    MASKED: tl.constexpr = FIRST + SECOND > WIDTH
    row, left, right = _place(FIRST, SECOND)
    y += row * WIDTH
    first = _load(y, left, WIDTH, False)
    second = _load(y, right, WIDTH, MASKED)
    first, second = _gelu(first), _gelu(second)
    _store_quantized(first, second, values, scales, row, left, right, WIDTH, MASKED, LARGEST, SMALLEST_SCALE)


@triton.jit
def gelu_gradient_kernel(
    grad,
    y,
    weight_scale,
    values,
    scales,
    WIDTH: tl.constexpr,
    FIRST: tl.constexpr,
    SECOND: tl.constexpr,
    LARGEST: tl.constexpr,
    SMALLEST_SCALE: tl.constexpr,
):
    """grad · gelu'(y) · weight_scale quantized."""
    MASKED: tl.constexpr = FIRST + SECOND > WIDTH
    row, left, right = _place(FIRST, SECOND)
    grad += row * WIDTH
    y += row * WIDTH
    first_grad = _load(grad, left, WIDTH, False)
    second_grad = _load(grad, right, WIDTH, MASKED)
    tl.debug_barrier()  # else the compiler, to save registers, reads grad when it is done with y, and waits twice
    first_y = _load(y, left, WIDTH, False)
    second_y = _load(y, right, WIDTH, MASKED)
    first = _gelu_gradient(first_grad, first_y, _load(weight_scale, left, WIDTH, False))
    second = _gelu_gradient(second_grad, second_y, _load(weight_scale, right, WIDTH, MASKED))
    _store_quantized(first, second, values, scales, row, left, right, WIDTH, MASKED, LARGEST, SMALLEST_SCALE)
