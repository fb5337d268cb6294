"""Parts of Triton kernels: an RMS norm, y = x · r · w with r = 1 / √(mean x² + ε), forward and undone."""

# mypy: ignore-errors
import triton
import triton.language as tl


@triton.jit
def inverse_rms(x, DIM: tl.constexpr, EPS: tl.constexpr):
    """r of each row of x, float32 [rows, DIM]."""
    return tl.rsqrt(tl.sum(x * x, 1) / DIM + EPS)


@triton.jit
def inverse_weight(weight):
    """1 / w, to divide the weight out; a channel with weight 0 gets no gradient from the mean."""
    return tl.where(weight == 0.0, 0.0, 1.0 / weight)
