"""The padding's share taken out of dense attention: against the formulas in float64, and in place."""

import pytest
import torch

from qwen_image.kernels.padding import without_padding

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
ROUNDING = {torch.float64: 0.0, torch.float32: 2**-24, torch.float16: 2**-11, torch.bfloat16: 2**-8}

# padding of each sample, the median of the real keys' part of the softmax sum, heads, tokens, head size
CASES = {
    "one sample padded": ((0, 31), 100.0, 24, 37, 128),
    "all padded, differently": ((1, 5, 500), 3000.0, 3, 16, 16),
    "share close to 1": ((32, 1), 0.02, 24, 33, 32),
    "one token": ((3,), 1.0, 1, 1, 16),
}


def make(case, dtype):
    """Output [B, H, L, D] with the memory of [B, L, H, D], log-sum-exp [B, H, L], zero keys [B]."""
    padding, median, heads, tokens, dim = CASES[case]
    generator = torch.Generator().manual_seed(0)
    padding = torch.tensor(padding, dtype=torch.float32)
    real = median * torch.exp(torch.randn(len(padding), heads, tokens, generator=generator))
    total = padding[:, None, None] + real
    output = torch.randn(len(padding), tokens, heads, dim, generator=generator)
    output = (output * (real / total).transpose(1, 2).unsqueeze(-1)).to(dtype).transpose(1, 2)
    lse = total.log().to(torch.float64 if dtype == torch.float64 else torch.float32)
    return output.to(DEVICE), lse.to(DEVICE), padding.to(DEVICE)


@pytest.mark.parametrize("dtype", ROUNDING, ids=str)
@pytest.mark.parametrize("case", CASES, ids=list(CASES))
def test_it_equals_the_formulas_and_rounds_once(case, dtype):
    output, lse, padding = make(case, dtype)
    share = padding.double()[:, None, None] * torch.exp(-lse.double())
    expected, expected_lse = output.double() / (1 - share).unsqueeze(-1), lse.double() + torch.log1p(-share)
    place, before = output.data_ptr(), lse.clone()
    corrected, corrected_lse = without_padding(output, lse, padding)
    assert corrected.dtype == dtype and corrected.is_contiguous() and corrected_lse.is_contiguous()
    assert corrected.data_ptr() == place, "one pass over the output, in place"
    assert torch.equal(lse, before)
    # The share in float32: exp's argument and result, at most 2⁻²⁰ together up to a log-sum-exp of 10.
    uncertain = 2**-20 * share / (1 - share)
    error = (corrected.transpose(1, 2).double() - expected).abs() / expected.abs().clamp(min=1e-3)
    assert (error <= 1.01 * ROUNDING[dtype] + 2**-22 + uncertain.unsqueeze(-1)).all()
    assert ((corrected_lse.double() - expected_lse).abs() <= 2**-22 * (1 + expected_lse.abs()) + uncertain).all()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_without_padding_every_bit_stays(dtype):
    output, lse, padding = make("one sample padded", dtype)
    before = output.transpose(1, 2).clone()
    corrected, corrected_lse = without_padding(output, lse, padding)
    assert torch.equal(corrected[0], before[0]) and torch.equal(corrected_lse[0], lse[0])
    assert not torch.equal(corrected[1], before[1])
