"""DoRA's two ways to store a layer's magnitude, and the exact step from one to the other.

PEFT and diffusers keep the length m that each row of the adapted weight has (arXiv:2402.09353, eq. 5):
    W' = m · (W + BA) / ‖W + BA‖
ComfyUI keeps `dora_scale` d [out, 1] and divides by the length of the base's row (comfy/weight_adapter/base.py,
weight_decompose, v0.3.77; ε is float32's):
    W' = d · (W + BA) / (‖W‖ + ε)          so   d = m · (‖W‖ + ε) / ‖W + BA‖
Norms are by row, over the inputs; the scale alpha/rank is inside B.
"""

import torch

EPSILON = torch.finfo(torch.float32).eps
HEADER = {"dora_scale": "W' = dora_scale * (W + B A) / (|W| + eps) by row, as ComfyUI v0.3.77 computes it"}


def dora_scale(
    weight: torch.Tensor, lora_a: torch.Tensor, lora_b: torch.Tensor, magnitude: torch.Tensor
) -> torch.Tensor:
    """ComfyUI's d, float32 [out, 1], of a base weight [out, in], A [r, in], B [out, r] and m [out]."""
    before, after = _row_norms(weight, lora_a, lora_b)
    return (magnitude.to(before.device, torch.float32) * (before + EPSILON) / after).unsqueeze(1)


def magnitude(
    weight: torch.Tensor, lora_a: torch.Tensor, lora_b: torch.Tensor, scale: torch.Tensor | None = None
) -> torch.Tensor:
    """PEFT's m, float32 [out], of ComfyUI's d [out, 1]; without one, that of a plain LoRA: ‖W + BA‖."""
    before, after = _row_norms(weight, lora_a, lora_b)
    return after if scale is None else scale.to(after.device, torch.float32).flatten() * after / (before + EPSILON)


def _row_norms(weight: torch.Tensor, lora_a: torch.Tensor, lora_b: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """‖W‖ and ‖W + BA‖ by row, float32 on the weight's device."""
    weight = weight.detach().float()
    update = lora_b.to(weight.device, torch.float32) @ lora_a.to(weight.device, torch.float32)
    return weight.norm(dim=1), (weight + update).norm(dim=1)
