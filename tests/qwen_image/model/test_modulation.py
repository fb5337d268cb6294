"""The modulation table: bit-equal to computing in place, off where it would be wrong."""

import pytest
import torch

from qwen_image.model.conditioning import Prompt
from qwen_image.model.modulation import RecordedModulation, modulation_of, replace_by_table
from qwen_image.model.modulation_table import time_inputs
from qwen_image.pipeline import QwenImagePipeline, predict_velocity
from train.lora.inject import inject_lora
from train.lora.spec import LoraSpec

GRID = [k / 1000 for k in range(1, 1001)]


def load(tiny_model, dtype, *components):
    return QwenImagePipeline.from_pretrained(str(tiny_model), components=("transformer", *components), dtype=dtype)


def inputs(transformer, dtype):
    generator = torch.Generator().manual_seed(0)
    prompt = torch.randn(1, 7, transformer.config.joint_attention_dim, generator=generator).to(dtype)
    return torch.randn(1, 12, 64, generator=generator).to(dtype), Prompt(prompt, None)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
def test_bit_equal_to_the_direct_computation(tiny_model, dtype):
    transformer = load(tiny_model, dtype).transformer
    latents, prompt = inputs(transformer, dtype)
    sigmas = [0.001, 0.02, 0.333, 0.5, 0.999, 1.0]
    with torch.no_grad():
        direct = [predict_velocity(transformer, latents, torch.tensor([s]), prompt, 3, 4) for s in sigmas]
        before = sum(p.numel() * p.element_size() for p in transformer.parameters())
        freed = replace_by_table(transformer, GRID)
        table = [predict_velocity(transformer, latents, torch.tensor([s]), prompt, 3, 4) for s in sigmas]
    assert all(torch.equal(a, b) for a, b in zip(direct, table, strict=True))
    left = sum(p.numel() * p.element_size() for p in transformer.parameters())
    assert left == before - freed and freed > 0.25 * before
    assert not any("_mod." in name or "norm_out" in name for name, _ in transformer.named_parameters())


def test_batches_of_different_noise_levels(tiny_model):
    transformer = load(tiny_model, torch.float32).transformer
    latents, prompt = inputs(transformer, torch.float32)
    latents, prompt = latents.repeat(3, 1, 1), Prompt(prompt.embeds.repeat(3, 1, 1), None)
    sigma = torch.tensor([0.1, 0.9, 0.1])
    with torch.no_grad():
        direct = predict_velocity(transformer, latents, sigma, prompt, 3, 4)
        replace_by_table(transformer, GRID)
        torch.testing.assert_close(
            predict_velocity(transformer, latents, sigma, prompt, 3, 4), direct, atol=1e-5, rtol=0
        )


def test_copies_look_like_what_was_looked_up(tiny_model):
    """CUDA graphs hold copies of it; were their strides others, the compiler would compile every block once more."""
    transformer = load(tiny_model, torch.float32).transformer
    replace_by_table(transformer, GRID)
    for batch in (1, 2, 3):
        for tensor in transformer.look_up(torch.full((batch,), 0.5)):
            assert tensor.clone().stride() == tensor.stride()


def test_bfloat16_needs_half_the_rows():
    assert len(time_inputs(GRID, torch.float32)) == 1000
    assert len(time_inputs(GRID, torch.bfloat16)) == 500


def test_sampling_with_its_schedule_in_the_table(tiny_model):
    pipeline = load(tiny_model, torch.float32, "vae", "text_encoder")
    options = {"height": 32, "width": 48, "num_inference_steps": 3, "seeds": [1]}
    before = pipeline.generate(["a fox"], **options)
    replace_by_table(pipeline.transformer, [*GRID, *pipeline.schedule.sigmas(3, 6).tolist()])
    assert torch.equal(pipeline.generate(["a fox"], **options), before)
    with pytest.raises(ValueError, match="no row for the time input"):
        pipeline.generate(["a fox"], **(options | {"num_inference_steps": 7}))


@pytest.mark.parametrize("target", ["img_mod.1", "txt_mod.1", "norm_out.linear"])
def test_refused_when_lora_reaches_the_modulation(tiny_model, target):
    transformer = load(tiny_model, torch.float32).transformer
    inject_lora(transformer, LoraSpec((target,), 2, 2))
    with pytest.raises(ValueError, match="needs frozen modulation"):
        replace_by_table(transformer, GRID)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="a CUDA graph needs a GPU")
def test_recorded_is_bit_equal_to_launched(tiny_model):
    transformer = load(tiny_model, torch.bfloat16).transformer.cuda()
    with torch.no_grad():
        embedded = [transformer.embed_time(time) for time in torch.tensor([0.1, 0.5, 0.9]).cuda().bfloat16().split(1)]
        blocks = list(transformer.transformer_blocks)
        recorded = RecordedModulation(blocks[0], embedded)
        for block in [*blocks, blocks[0]]:
            assert torch.equal(recorded(block), modulation_of(block, embedded))
