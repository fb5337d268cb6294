"""The pipeline against diffusers' own, on a tiny model made of the real classes."""

import numpy as np
import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler
from diffusers import QwenImagePipeline as DiffusersPipeline

from qwen_image.encoders.vae import pixels_from_uint8
from qwen_image.model.conditioning import Prompt
from qwen_image.noise_schedule import SigmaSchedule
from qwen_image.pipeline import (
    QwenImagePipeline,
    draw_noise,
    guide,
    pack_latents,
    predict_velocity,
    unpack_latents,
)

CAPTIONS = ["a red fox in the snow", "", "three pears and a jug of water on a wooden table, late light"]


@pytest.fixture(scope="module")
def ours(tiny_model):
    return QwenImagePipeline.from_pretrained(str(tiny_model), dtype=torch.float32)


@pytest.fixture(scope="module")
def theirs(tiny_model):
    pipeline = DiffusersPipeline.from_pretrained(tiny_model, torch_dtype=torch.float32)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def diffusers_velocity(transformer, latents, sigma, prompt, rows, columns):
    timestep = (sigma * 1000).to(latents.dtype) / 1000
    return transformer(
        hidden_states=latents,
        timestep=timestep,
        encoder_hidden_states=prompt.embeds,
        encoder_hidden_states_mask=None if prompt.mask is None else prompt.mask.long(),
        img_shapes=[[(1, rows, columns)]] * len(latents),
        return_dict=False,
    )[0]


def random_inputs(transformer, rows, columns, lengths, dtype=torch.float32):
    generator = torch.Generator().manual_seed(rows * 100 + columns)
    width = transformer.config.joint_attention_dim
    prompt = Prompt.from_list([torch.randn(n, width, generator=generator).to(dtype) for n in lengths])
    latents = torch.randn(len(lengths), rows * columns, 64, generator=generator).to(dtype)
    return latents, torch.linspace(0.95, 0.03, len(lengths)), prompt


SIZES = [(1, 1), (2, 3), (5, 4), (8, 8), (3, 17), (17, 2)]


@pytest.mark.parametrize("rows,columns", SIZES)
@pytest.mark.parametrize("lengths", [(7,), (9, 9), (5, 21, 12)], ids=["single", "equal", "padded"])
def test_velocity_equals_diffusers_in_float32(ours, theirs, rows, columns, lengths):
    latents, sigma, prompt = random_inputs(ours.transformer, rows, columns, lengths)
    assert (prompt.mask is None) == (len(set(lengths)) == 1)
    with torch.no_grad():
        expected = diffusers_velocity(theirs.transformer, latents, sigma, prompt, rows, columns)
        actual = predict_velocity(ours.transformer, latents, sigma, prompt, rows, columns)
    assert expected.std() > 0.1, "a silent model would make any comparison pass"
    torch.testing.assert_close(actual, expected, atol=1e-5, rtol=0)


@pytest.mark.parametrize("lengths", [(9, 9), (5, 21)], ids=["equal", "padded"])
def test_velocity_equals_diffusers_in_bfloat16(tiny_model, lengths):
    theirs = DiffusersPipeline.from_pretrained(tiny_model, torch_dtype=torch.bfloat16).transformer
    ours = QwenImagePipeline.from_pretrained(str(tiny_model), components=("transformer",)).transformer
    latents, sigma, prompt = random_inputs(ours, 6, 9, lengths, torch.bfloat16)
    reference = QwenImagePipeline.from_pretrained(str(tiny_model), components=("transformer",), dtype=torch.float32)
    with torch.no_grad():
        expected = diffusers_velocity(theirs, latents, sigma, prompt, 6, 9).float()
        actual = predict_velocity(ours, latents, sigma, prompt, 6, 9).float()
        # The float32 model gets the bf16 model's time input, so only the arithmetic differs.
        bf16_sigma = ((sigma * 1000).bfloat16() / 1000).float()
        exact = predict_velocity(
            reference.transformer, latents.float(), bf16_sigma, prompt.to("cpu", torch.float32), 6, 9
        )
    rounding = (expected - exact).abs().max()
    assert (actual - exact).abs().max() <= 1.5 * rounding, "our bf16 must be as close to float32 as diffusers' bf16 is"
    assert (actual - expected).abs().max() <= 2 * rounding


def test_padding_does_not_change_a_sample(ours):
    latents, sigma, prompt = random_inputs(ours.transformer, 4, 4, (5, 21))
    alone = Prompt(prompt.embeds[:1, :5], None)
    with torch.no_grad():
        batch = predict_velocity(ours.transformer, latents, sigma, prompt, 4, 4)[:1]
        single = predict_velocity(ours.transformer, latents[:1], sigma[:1], alone, 4, 4)
    torch.testing.assert_close(batch, single, atol=1e-5, rtol=0)


def test_activation_checkpointing_keeps_output_and_gradient(ours):
    latents, sigma, prompt = random_inputs(ours.transformer, 3, 4, (5, 8))
    results = []
    for blocks in (0, 1, ours.transformer.config.num_layers):
        ours.transformer.checkpointed_blocks = blocks
        inputs = latents.clone().requires_grad_()
        velocity = predict_velocity(ours.transformer, inputs, sigma, prompt, 3, 4)
        velocity.square().sum().backward()
        results.append((velocity.detach(), inputs.grad))
    ours.transformer.checkpointed_blocks = 0
    for velocity, gradient in results[1:]:
        assert torch.equal(velocity, results[0][0])
        assert torch.equal(gradient, results[0][1])


def test_prompt_embeddings_equal_diffusers(ours, theirs):
    embeds, mask = theirs.encode_prompt(CAPTIONS, max_sequence_length=1024)
    prompt = ours.text_encoder.encode(CAPTIONS)
    assert torch.equal(prompt.embeds, embeds)
    assert torch.equal(prompt.mask.long(), mask)
    assert ours.text_encoder.template_drop == theirs.prompt_template_encode_start_idx == 34


def test_empty_caption_keeps_the_five_tokens_of_the_template_end(ours):
    prompt = ours.text_encoder.encode([""])
    assert prompt.embeds.shape[1] == 5 and prompt.mask is None


@pytest.mark.parametrize("limit", [6, 512])
def test_long_captions_are_cut_as_diffusers_cuts_them(ours, theirs, limit):
    captions = ["word " * 1500, "short"]
    embeds, mask = theirs.encode_prompt(captions, max_sequence_length=limit)
    prompt = ours.text_encoder.encode(captions, max_tokens=limit)
    torch.testing.assert_close(prompt.embeds, embeds, atol=1e-5, rtol=0)
    assert (prompt.mask is None) == (mask is None) and (mask is None or torch.equal(prompt.mask.long(), mask))


@pytest.mark.parametrize("height,width", [(64, 64), (48, 96), (112, 32)])
def test_vae_latents_and_images_equal_diffusers(ours, theirs, height, width):
    generator = torch.Generator().manual_seed(height)
    images = pixels_from_uint8(torch.randint(0, 256, (2, 3, height, width), generator=generator, dtype=torch.uint8))
    config = theirs.vae.config
    mean, std = (torch.tensor(v).view(1, 16, 1, 1, 1) for v in (config.latents_mean, config.latents_std))
    expected = (theirs.vae.encode(images.unsqueeze(2)).latent_dist.mode() - mean) / std
    latents = ours.vae.encode(images)
    assert latents.shape == (2, 16, 1, height // 8, width // 8)
    assert torch.equal(latents, expected)
    decoded = theirs.vae.decode(expected * std + mean, return_dict=False)[0][:, :, 0]
    assert torch.equal(ours.vae.decode(latents), decoded)


@pytest.mark.parametrize("height,width,scale", [(64, 64, 4.0), (48, 96, 1.0), (96, 48, 2.5)])
def test_generated_images_equal_diffusers(ours, theirs, height, width, scale):
    prompts = CAPTIONS[:2]
    expected = theirs(
        prompts,
        negative_prompt=[" ", " "],
        true_cfg_scale=scale,
        height=height,
        width=width,
        num_inference_steps=5,
        generator=[torch.Generator().manual_seed(seed) for seed in (3, 4)],
        output_type="np",
    ).images
    actual = ours.generate(
        prompts, height=height, width=width, num_inference_steps=5, true_cfg_scale=scale, seeds=[3, 4]
    )
    assert expected.std() > 0.05
    assert np.abs(actual.numpy() / 255.0 - expected).max() <= 2 / 255


def test_pack_and_unpack_equal_diffusers():
    latents = torch.randn(2, 16, 1, 6, 10)
    expected = DiffusersPipeline._pack_latents(latents.permute(0, 2, 1, 3, 4).contiguous(), 2, 16, 6, 10)
    assert torch.equal(pack_latents(latents), expected)
    assert torch.equal(unpack_latents(pack_latents(latents), 3, 5), latents)


@pytest.mark.parametrize("steps", [2, 8, 50])
@pytest.mark.parametrize("tokens,shift", [(1024, 1.714), (4096, 2.001), (6889, 2.303)])
def test_schedule_equals_diffusers_bit_for_bit(theirs, steps, tokens, shift):
    schedule = SigmaSchedule()
    scheduler = FlowMatchEulerDiscreteScheduler.from_config(theirs.scheduler.config)
    scheduler.set_timesteps(sigmas=np.linspace(1.0, 1 / steps, steps), mu=schedule.mu(tokens))
    assert torch.equal(schedule.sigmas(steps, tokens), scheduler.sigmas)
    assert np.exp(schedule.mu(tokens)) == pytest.approx(shift, abs=6e-4)


def test_noise_of_an_image_does_not_depend_on_its_batch():
    assert torch.equal(draw_noise([5, 6], 32, 48, torch.float32)[1:], draw_noise([6], 32, 48, torch.float32))


def test_guidance_keeps_each_tokens_norm():
    positive, negative = torch.randn(2, 5, 64), torch.randn(2, 5, 64)
    torch.testing.assert_close(guide(positive, negative, 4.0).norm(dim=-1), positive.norm(dim=-1))
