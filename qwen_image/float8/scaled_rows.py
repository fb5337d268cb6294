"""Float8 (e4m3): rows of 8-bit numbers with a scale each, and products of them.

How it works. An e4m3 number has a sign, 4 bits of exponent and 3 of mantissa: the largest is 448, the smallest 2⁻⁹, and in
the normal range (from 2⁻⁶) rounding errs by at most 1/16. Tensor cores multiply such numbers at twice the rate of bf16 and
add the products up in float32. That the narrow range is well used, values are divided by a scale before they are rounded, so
that the largest becomes 448, and the product is multiplied by the scales of both operands afterwards:

    x ≈ sₓ · qₓ,  W ≈ s_W · q_W   →   x·Wᵀ ≈ (qₓ · q_Wᵀ) · sₓ · s_Wᵀ

A scale can be factored out of a sum only if it does not vary along it: one for a whole tensor always may be, one for each row
of x (a token) and each row of W (an output channel) too, as the sum runs over the columns of both. Rows are what is used
here: an outlier costs its own token precision, not all, and a row can be scaled as soon as it was made.

What is special. In the input's gradient g·W the weight's row scales s lie along the sum, Σₙ gₙ sₙ Wₙ: so g·s is what gets
quantized. And float8 products take operands whose rows lie along the sum alone, so the backward pass needs the weight
transposed: kept beside the other, or made each time. Format: OCP 8-bit floating point specification, E4M3.
"""

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F

FLOAT8 = torch.float8_e4m3fn
LARGEST = 448.0  # torch.finfo(FLOAT8).max
SMALLEST_SCALE = 1e-30  # for rows of zeros; gradients times weight scales reach 1e-16
# Of fewer rows cuBLAS 13.0 lacks some products: below 43 those with rows' scales, a bias, fast accumulation and K from 9216
# on. Zero rows make up the number: a product of so few takes as long as reading the weight.
FEWEST_ROWS = 128


def quantize_rows(values: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """values [M, K] → float8 [M, K] and scales float32 [M, 1] with values ≈ float8 · scale; NaN and ∞ spoil their row."""
    scale = (values.abs().amax(-1, keepdim=True).float() / LARGEST).clamp(min=SMALLEST_SCALE)
    return (values.float() * scale.reciprocal()).to(FLOAT8), scale


def scaled_product(
    left: torch.Tensor,
    left_scale: torch.Tensor,
    right: torch.Tensor,
    right_scale: torch.Tensor,
    bias: torch.Tensor | None,
    dtype: torch.dtype,
) -> torch.Tensor:
    """left [M, K] · right [N, K]ᵀ with scales [M, 1] and [1, N], plus bias [N] → [M, N] of `dtype` (bf16 on a GPU).

    On the CPU the same sum in float32: right, but slow.
    """
    if left.is_cuda:
        if len(left) < FEWEST_ROWS:
            return torch.ops.qwen_image.product_of_few_rows(left, left_scale, right, right_scale, bias, dtype)
        return torch._scaled_mm(
            left,
            right.t(),
            scale_a=left_scale,
            scale_b=right_scale,
            bias=bias,
            out_dtype=dtype,
            use_fast_accum=True,
        )
    product = (left.float() @ right.float().t()) * left_scale * right_scale
    return (product if bias is None else product + bias.float()).to(dtype)


@torch.library.custom_op("qwen_image::product_of_few_rows", mutates_args=())
def product_of_few_rows(
    left: torch.Tensor,
    left_scale: torch.Tensor,
    right: torch.Tensor,
    right_scale: torch.Tensor,
    bias: torch.Tensor | None,
    dtype: torch.dtype,
) -> torch.Tensor:
    """`scaled_product` with zero rows below; an operator, because not every compiler can pad float8."""
    more = (0, 0, 0, FEWEST_ROWS - len(left))
    padded = F.pad(left.view(torch.uint8), more).view(left.dtype)
    return scaled_product(padded, F.pad(left_scale, more), right, right_scale, bias, dtype)[: len(left)]


@product_of_few_rows.register_fake
def _(
    left: torch.Tensor, _l: torch.Tensor, right: torch.Tensor, _r: torch.Tensor, _b: Any, dtype: torch.dtype
) -> torch.Tensor:
    return left.new_empty((left.shape[0], right.shape[0]), dtype=dtype)


class Float8Weight(NamedTuple):
    """A quantized weight: data [N, K] · scaleᵀ. The backward pass takes `transposed` [K, N] if there, and `ones` [1, K]."""

    data: torch.Tensor
    scale: torch.Tensor  # float32 [1, N]
    ones: torch.Tensor
    transposed: torch.Tensor | None

    def output(self, x: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        """x [M, K] → x·Wᵀ + bias [M, N]."""
        return self.output_of_rows(*quantize_rows(x), bias, x.dtype)

    def output_of_rows(
        self, rows: torch.Tensor, scales: torch.Tensor, bias: torch.Tensor | None, dtype: torch.dtype
    ) -> torch.Tensor:
        """The same from x quantized: float8 [M, K] and scales [M, 1]."""
        return scaled_product(rows, scales, self.data, self.scale, bias, dtype)

    def input_gradient(self, gradient: torch.Tensor) -> torch.Tensor:
        """The output's gradient [M, N] → the input's, [M, K]."""
        return self.input_gradient_of_rows(*quantize_rows(gradient.float() * self.scale), gradient.dtype)

    def input_gradient_of_rows(self, rows: torch.Tensor, scales: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        """The same from gradient · `scale` quantized: float8 [M, N] and scales [M, 1]."""
        transposed = self.data.t().contiguous() if self.transposed is None else self.transposed
        return scaled_product(rows, scales, transposed, self.ones, None, dtype)
