"""The kernel that takes padding out of dense attention (on a GPU, else in Triton's interpreter), against float64."""

import math
import os
from importlib.util import find_spec

import pytest
import torch

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
HAS_TRITON = find_spec("triton") is not None
DEVICE = "cuda" if torch.cuda.is_available() and not INTERPRETED else "cpu"
needs_kernel = pytest.mark.skipif(
    not HAS_TRITON or (DEVICE == "cpu" and not INTERPRETED),
    reason="the kernel runs on a GPU, or by `make test-kernels`",
)
needs_rounding = pytest.mark.skipif(DEVICE == "cpu", reason="the interpreter truncates to bf16 where a GPU rounds")
ROUNDING = {torch.float32: 2**-24, torch.float16: 2**-11, torch.bfloat16: 2**-8}

# padding of each sample, the median of the real keys' part of the softmax sum, heads, tokens, head size
CASES = {
    "one sample padded": ((0, 31), 100.0, 24, 37, 128),
    "all padded, differently": ((1, 5, 500), 3000.0, 3, 16, 16),
    "share close to 1": ((32, 1), 0.02, 24, 33, 32),
    "real keys of all sizes": ((7,), 7.0, 5, 129, 64),
    "one token": ((3,), 1.0, 1, 1, 16),
}


def make(case, dtype):
    padding, median, heads, tokens, dim = CASES[case]
    generator = torch.Generator().manual_seed(0)
    shape = (len(padding), heads, tokens)
    padding = torch.tensor(padding, dtype=torch.float32)
    real = median * torch.exp(torch.randn(shape, generator=generator))
    total = padding[:, None, None] + real
    output = torch.randn(len(padding), tokens, heads, dim, generator=generator)
    output = (output * (real / total).transpose(1, 2).unsqueeze(-1)).to(dtype).transpose(1, 2)
    return output.to(DEVICE), total.log().to(DEVICE), padding.to(DEVICE)


@needs_kernel
@pytest.mark.parametrize(
    "dtype", [torch.float32, torch.float16, pytest.param(torch.bfloat16, marks=needs_rounding)], ids=str
)
@pytest.mark.parametrize("case", CASES, ids=list(CASES))
def test_it_equals_the_formulas(case, dtype):
    from qwen_image.kernels.padding_kernel import can_correct, correct

    output, lse, padding = make(case, dtype)
    share = padding.double()[:, None, None] * torch.exp(-lse.double())
    expected = output.double() / (1 - share).unsqueeze(-1)
    expected_lse = lse.double() + torch.log1p(-share)
    assert can_correct(output, lse)
    dense_lse = lse.clone()
    corrected = correct(output, lse, padding)
    assert torch.equal(lse, dense_lse)
    assert corrected.dtype == torch.float32
    assert corrected.is_contiguous()
    # The share in float32: exp's argument and result, at most 2⁻²⁰ together up to a log-sum-exp of 10.
    uncertain = 2**-20 * share / (1 - share)
    error = (output.double() - expected).abs() / expected.abs().clamp(min=1e-3)
    assert (error <= 1.01 * ROUNDING[dtype] + 2**-22 + uncertain.unsqueeze(-1)).all()
    assert ((corrected.double() - expected_lse).abs() <= 2**-23 * (1 + expected_lse.abs()) + uncertain).all()


@needs_kernel
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_without_padding_every_bit_stays(dtype):
    from qwen_image.kernels.padding_kernel import correct

    output, lse, padding = make("one sample padded", dtype)
    before = output.clone()
    corrected = correct(output, lse, padding)
    assert torch.equal(output[0], before[0])
    assert torch.equal(corrected[0], lse[0])
    assert not torch.equal(output[1], before[1])
    before = output.clone()
    assert torch.equal(correct(output, corrected, torch.zeros_like(padding)), corrected)
    assert torch.equal(output, before)


@needs_kernel
def test_dense_attention_over_zero_keys_becomes_masked_attention():
    from qwen_image.kernels.padding_kernel import correct

    generator = torch.Generator().manual_seed(0)
    query, key, value = torch.randn(3, 2, 21, 6, 16, generator=generator).transpose(2, 3).to(DEVICE).unbind()
    keep = torch.arange(21, device=DEVICE) >= torch.tensor([[0], [20]], device=DEVICE)
    scores = query.double() @ key.double().transpose(-1, -2) / 4
    masked = scores.masked_fill(~keep[:, None, None], -math.inf)
    expected = masked.softmax(-1) @ value.double()
    zeroed = scores * keep[:, None, None]
    lse = zeroed.logsumexp(-1).float()
    dense = zeroed.softmax(-1) @ (value * keep[:, None, :, None]).double()
    dense = dense.float().transpose(1, 2).contiguous().transpose(1, 2)
    corrected = correct(dense, lse, (~keep).sum(1, dtype=torch.float32))
    # With one real key of score −4 the share is 0.999: what lse was rounded by counts a thousandfold.
    torch.testing.assert_close(dense.double(), expected, rtol=1e-3, atol=1e-5)
    torch.testing.assert_close(corrected.double(), masked.logsumexp(-1), rtol=0, atol=1e-3)
    torch.testing.assert_close(dense[0].double(), expected[0], rtol=1e-5, atol=1e-6)


@needs_kernel
def test_what_the_kernel_cannot_do():
    from qwen_image.kernels.padding_kernel import can_correct

    output, lse, _ = make("one sample padded", torch.float16)
    assert not can_correct(output.contiguous(), lse)
    assert not can_correct(output, lse.double())
    assert not can_correct(output, lse.transpose(1, 2).contiguous().transpose(1, 2))
    for dim in (4, 24, 96):
        assert not can_correct(output.new_empty(2, 9, 3, dim).transpose(1, 2), lse)
