"""A transformer of two narrow blocks with random weights, the same each time."""

import torch

from qwen_image.model.sizes import TransformerConfig
from qwen_image.model.transformer import QwenImageTransformer


def small_transformer(device: str = "cpu") -> QwenImageTransformer:
    """Frozen; prompt embeddings are 24 wide. Leaves torch's generator where drawing the weights left it."""
    config = TransformerConfig(
        num_layers=2, attention_head_dim=16, num_attention_heads=2, joint_attention_dim=24, axes_dims_rope=(4, 6, 6)
    )
    torch.manual_seed(0)
    transformer = QwenImageTransformer(config).to(device).requires_grad_(False)
    for parameter in transformer.parameters():
        parameter.normal_(0, 0.2)
    return transformer
