"""ZeRO-2's optimizer step with less work a tensor, judged where the gradients are: the host needn't wait for them.

DeepSpeed reads the gradient's norm on the host at each step, to clip by it and to leave out a step that is not finite. The
host then begins to launch the next step only when the device is done with this one, and the device is idle meanwhile. Here
the norm stays on the device, clips there, and tells AdamW's fused kernel, by the flag made for gradient
scaling (`found_inf`), to leave weights and moments as they are. Names were read in DeepSpeed 0.19.8 and torch 2.11 to
2.13, to which pyproject.toml pins.
"""

from typing import Any

import torch
import torch.distributed as dist
from torch import nn

CLIP_EPSILON = 1e-6  # DeepSpeed's


def lighten(zero: Any) -> None:
    """Take per-tensor work out of the step: with hundreds of LoRA matrices its launches cost a tenth of a step.

    The norm of all gradients is computed by fused kernels instead of one or two a tensor. The separate search for
    infinities goes: a step is left out whenever that norm is not finite.
    """

    def norm(gradients: list[torch.Tensor], params: list[nn.Parameter], norm_type: float = 2) -> torch.Tensor:
        present = [gradient for gradient in gradients if not getattr(gradient, "_zero_padding", False)]
        squares = torch.zeros((), device=zero.device, dtype=torch.float64)
        if present:
            squares = torch.stack(torch._foreach_norm(present, 2.0)).double().square().sum()
        dist.all_reduce(squares, group=zero.dp_process_group)
        total = squares.sqrt().float()
        return torch.where(torch.isfinite(total), total, -1.0)  # DeepSpeed's sign for "not finite"

    zero.get_grad_norm_direct = norm
    zero.check_overflow = lambda partition_gradients=True: None


def can_judge_on_device(zero: Any) -> bool:
    """Whether `judge_on_device` works: a fused AdamW, and bf16 weights, whose norm DeepSpeed doesn't insist on reading."""
    return bool(zero.optimizer.defaults.get("fused")) and zero.dtype == torch.bfloat16


def judge_on_device(zero: Any) -> None:
    """Clip by the norm, and leave a step out, without the host."""
    zero.check_grad_overflow = False
    scaled_global_norm = zero.scaled_global_norm

    def norm_and_verdict(norm_type: int = 2) -> torch.Tensor:
        norm: torch.Tensor = scaled_global_norm(norm_type)  # infinite when any gradient is not finite
        zero.optimizer.found_inf = (~torch.isfinite(norm)).float()
        return norm

    def clip(gradients: list[torch.Tensor], norm: torch.Tensor) -> None:
        """DeepSpeed's formula; its loss scale is 1 in bf16."""
        if zero.clip_grad > 0:
            divisor = ((norm + CLIP_EPSILON) / zero.clip_grad).clamp(min=1.0)
            for gradient in gradients:
                gradient.mul_(1.0 / divisor)

    zero.scaled_global_norm = norm_and_verdict
    zero.unscale_and_clip_grads = clip


def step_applied(engine: Any) -> torch.Tensor | bool:
    """Whether the engine's last step was taken, the same on all ranks; on the device where it was judged there."""
    found = getattr(getattr(engine.optimizer, "optimizer", None), "found_inf", None)
    return bool(engine.was_step_applied()) if found is None else found == 0
