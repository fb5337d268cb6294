"""The padding's share taken out of dense attention over zero keys (qwen_image/model/attention.py has the formulas)."""

import torch


def without_padding(
    output: torch.Tensor, lse: torch.Tensor, padding: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Dense attention's output [B, H, L, D] and log-sum-exp [B, H, L] → what they are without the zero keys.

    `padding` [B], float32: so many of each sample's keys are zero. The output is divided in place, in float32 and one pass,
    and returned as [B, L, H, D], contiguous.
    """
    share = padding.view(-1, 1, 1) * torch.exp(-lse)
    output.div_((1 - share).unsqueeze(-1))
    return output.transpose(1, 2).contiguous(), (lse + torch.log1p(-share)).contiguous()
