"""The full-size transformer with random weights, made where it is used: nothing is read from a disk."""

import torch

from qwen_image.transformer import QwenImageTransformer, TransformerConfig


def random_transformer(layers: int, device: torch.device, dtype: torch.dtype) -> QwenImageTransformer:
    """The full-size shape with so many blocks, weights N(0, 0.02), built on the device."""
    with torch.device("meta"):
        transformer = QwenImageTransformer(TransformerConfig(num_layers=layers)).to(dtype)
    transformer.to_empty(device=device)
    for name, parameter in transformer.named_parameters():
        parameter.data.normal_(0, 0.02) if parameter.ndim > 1 or "bias" in name else parameter.data.fill_(1.0)
        parameter.requires_grad_(False)
    return transformer.eval()
