"""Fused projections compute what PEFT's separate layers compute, outputs and gradients, and store nothing twice."""

import pytest
import torch

from qwen_image.model.conditioning import Prompt
from qwen_image.pipeline import QwenImagePipeline, predict_velocity
from train.lora.inject import inject_lora, lora_parameters
from train.lora.spec import LoraSpec
from train.step.fused_projection import can_fuse, fuse_projections


@pytest.mark.parametrize(
    "spec",
    [
        LoraSpec(("to_q", "to_k", "to_v", "add_q_proj", "add_k_proj", "add_v_proj"), 4, 8.0),
        LoraSpec(("to_k", "add_v_proj", "proj_out"), 4, 4.0),
        LoraSpec(("proj_out",), 4, 4.0),
    ],
    ids=["all", "some", "none"],
)
def test_velocity_and_gradients_equal_the_separate_layers(tiny_model, spec):
    transformer = QwenImagePipeline.from_pretrained(
        str(tiny_model), components=("transformer",), dtype=torch.float32
    ).transformer
    inject_lora(transformer, spec)
    generator = torch.Generator().manual_seed(0)
    for name, parameter in lora_parameters(transformer).items():
        if name.endswith("lora_B"):
            parameter.data.normal_(std=0.1, generator=generator)
    latents = torch.randn(2, 12, 64, generator=generator)
    prompt = Prompt.from_list(
        [torch.randn(n, transformer.config.joint_attention_dim, generator=generator) for n in (5, 9)]
    )
    names = [name for name, _ in transformer.named_parameters()]
    results = []
    for fused in (False, True):
        if fused:
            fuse_projections(transformer)
        velocity = predict_velocity(transformer, latents, torch.tensor([0.3, 0.8]), prompt, 3, 4)
        parameters = lora_parameters(transformer)
        gradients = torch.autograd.grad(velocity.square().sum(), list(parameters.values()))
        results.append((velocity.detach(), *gradients))
    for separate, together in zip(*results, strict=True):
        torch.testing.assert_close(together, separate, rtol=1e-4, atol=1e-4)
    assert [name for name, _ in transformer.named_parameters()] == names
    attention = transformer.transformer_blocks[0].attn
    base = getattr(attention.to_k, "base_layer", attention.to_k)
    assert base.weight.untyped_storage().data_ptr() == attention.image_projection.weight.untyped_storage().data_ptr()


def test_only_where_peft_would_do_the_same():
    plain = LoraSpec(("to_q",), 4, 4.0)
    assert can_fuse(plain, torch.bfloat16, torch.bfloat16)
    assert not can_fuse(plain, torch.float32, torch.bfloat16)
    assert not can_fuse(LoraSpec(("to_q",), 4, 4.0, dropout=0.1), torch.float32, torch.float32)
    assert not can_fuse(LoraSpec(("to_q",), 4, 4.0, dora=True), torch.float32, torch.float32)
