"""The padding's share taken out of dense attention over zero keys (qwen_image/model/attention.py has the formulas)."""

from importlib.util import find_spec

import torch

HAS_TRITON = find_spec("triton") is not None
if HAS_TRITON:
    from qwen_image.kernels import padding_kernel


def without_padding(
    output: torch.Tensor, lse: torch.Tensor, padding: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Dense attention's output [B, H, L, D] and log-sum-exp [B, H, L] → what they are without the zero keys.

    `padding` [B], float32: so many of each sample's keys are zero. The output returned is [B, L, H, D], contiguous, and
    may be the given one, changed in place: PyTorch's operations move three times the bytes of the Triton kernel.
    """
    if HAS_TRITON and output.is_cuda and padding_kernel.can_correct(output, lse):
        return output.transpose(1, 2), padding_kernel.correct(output, lse, padding)
    share = padding.view(-1, 1, 1) * torch.exp(-lse)
    corrected = (output / (1 - share).unsqueeze(-1)).to(output.dtype)
    return corrected.transpose(1, 2).contiguous(), (lse + torch.log1p(-share)).contiguous()
