"""Triton kernel that takes the padding's share out of dense attention (qwen_image/model/attention.py has the formulas).

One program corrects ROWS tokens of one head: each byte of the output is read and written once; PyTorch's operations also
write and read it in float32, three times the bytes. Heads run fastest, so neighbours work on neighbouring memory. A sample
without padding keeps its output untouched, and its log-sum-exp bit by bit.
"""

# mypy: ignore-errors
import torch
import triton
import triton.language as tl

ROWS = 16  # of the log-sum-exp: two sectors of memory
WARPS = 4


@triton.jit(do_not_specialize=["tokens"])
def correction_kernel(
    output,
    lse,
    padding,
    corrected,
    tokens,
    HEADS: tl.constexpr,
    DIM: tl.constexpr,
    ROWS: tl.constexpr,
):
    head = tl.program_id(0)
    sample = tl.program_id(2).to(tl.int64)
    row = tl.program_id(1) * ROWS + tl.arange(0, ROWS)
    inside = row < tokens
    zeros = tl.load(padding + sample)
    place = (sample * HEADS + head) * tokens + row
    dense = tl.load(lse + place, mask=inside, other=float("inf"))
    if zeros == 0:
        tl.store(corrected + place, dense, mask=inside)
    else:
        tile = output + sample * tokens * (HEADS * DIM)
        tile += (row * HEADS + head)[:, None] * DIM + tl.arange(0, DIM)[None, :]
        values = tl.load(tile, mask=inside[:, None]).to(tl.float32)
        real = 1 - zeros * tl.exp(-dense)  # the real keys' share
        tl.store(tile, (values * (1 / real)[:, None]).to(output.dtype.element_ty), mask=inside[:, None])
        # No log1p: rounding `real` moves its logarithm by 2⁻²⁵, no more than rounding a sum from 0.5 on does.
        tl.store(corrected + place, dense + tl.log(real), mask=inside)


def can_correct(output: torch.Tensor, lse: torch.Tensor) -> bool:
    """Whether `correct` can do it: output [B, H, L, D] with the memory of [B, L, H, D], D a power of two; float32 lse."""
    dim = output.shape[3]
    return (
        output.transpose(1, 2).is_contiguous()
        and lse.is_contiguous()
        and lse.dtype == torch.float32
        and dim & (dim - 1) == 0
        and ROWS * dim >= 32 * WARPS  # else threads would share an element, and one could read what another has written
    )


def correct(output: torch.Tensor, lse: torch.Tensor, padding: torch.Tensor) -> torch.Tensor:
    """Corrects `output` in place; returns the corrected log-sum-exp [B, H, L], float32.

    output [B, H, L, D] and lse [B, H, L] are dense attention's over keys of which `padding` (float32 [B]) are zero.
    """
    batch, heads, tokens, dim = output.shape
    corrected = torch.empty_like(lse)
    correction_kernel[(heads, triton.cdiv(tokens, ROWS), batch)](
        output, lse, padding, corrected, tokens, HEADS=heads, DIM=dim, ROWS=ROWS, num_warps=WARPS
    )
    return corrected
