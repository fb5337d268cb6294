"""The arithmetic that a training step can't do without, and what a GPU could do in the same time.

Model FLOPs utilization (MFU, arXiv:2204.02311, appendix B) is their ratio: recomputed blocks are not counted, so that it falls
when a step does more than it must.
"""

import torch

from qwen_image.model.sizes import TransformerConfig

PER_WEIGHT = 4 + 8  # of a block and stream, in D²: q, k, v and the output; the MLP's two matrices
# Dense bf16 TFLOP/s as NVIDIA's data sheets say, by what is in the name that the driver gives; the first that fits.
PEAKS = {
    "H100 PCIe": 756.0,
    "H100 NVL": 835.0,
    "H100": 989.4,
    "H200": 989.4,
    "H20": 148.0,
    "H800": 989.4,
    "GH200": 989.4,
    "B200": 2250.0,
    "B100": 1750.0,
    "A100": 312.0,
    "A800": 312.0,
    "L40S": 362.0,
    "L40": 181.0,
    "L4": 121.0,
    "A40": 149.7,
    "A10": 125.0,
    "RTX 6000 Ada": 364.2,
    "RTX A6000": 154.8,
    "RTX 5090": 209.5,
    "RTX 4090": 165.2,
    "RTX 3090": 71.0,
}


def step_flops(config: TransformerConfig, samples: int, image_tokens: int, text_tokens: int) -> float:
    """Of forward and backward pass over `samples`, without the LoRA's own products (under 2 %).

    Linear layers twice, forward and input gradient, since frozen weights have no gradient of their own; attention forward
    and twice that backward: 154 TFLOP for 4,096 image and 128 text tokens of Qwen-Image.
    """
    tokens, width = image_tokens + text_tokens, config.inner_dim
    linear = 2 * config.num_layers * PER_WEIGHT * width**2 * tokens
    attention = 4 * config.num_layers * tokens**2 * width
    return float(samples * (2 * linear + 3 * attention))


def peak_flops(device: torch.device) -> float | None:
    """Dense bf16 FLOP/s of a GPU; None for a CPU and for cards that are not listed."""
    if device.type != "cuda":
        return None
    name = torch.cuda.get_device_name(device)
    return next((peak * 1e12 for card, peak in PEAKS.items() if card in name), None)
