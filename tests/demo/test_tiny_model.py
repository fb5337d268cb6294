"""The tiny model is a real checkpoint in all but size: diffusers loads it, and its tokenizer counts as the real one."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import pytest

from demo.tiny_model import (
    SPECIAL_TOKENS,
    TEMPLATE_PREFIX,
    TEMPLATE_PREFIX_TOKENS,
    TEMPLATE_SUFFIX,
    TEMPLATE_SUFFIX_TOKENS,
    build_tiny_model,
    main,
    rotary_axes,
)


@pytest.fixture(scope="module")
def pipeline(tiny_model: Path):
    from diffusers import QwenImagePipeline

    pipeline = QwenImagePipeline.from_pretrained(tiny_model)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def weight_hashes(folder: Path) -> dict[str, str]:
    files = sorted([*folder.rglob("*.safetensors"), *folder.rglob("tokenizer.json")])
    return {str(file.relative_to(folder)): hashlib.sha256(file.read_bytes()).hexdigest() for file in files}


def test_template_is_the_one_of_diffusers(pipeline):
    assert pipeline.prompt_template_encode == TEMPLATE_PREFIX + "{}" + TEMPLATE_SUFFIX
    assert pipeline.prompt_template_encode_start_idx == TEMPLATE_PREFIX_TOKENS


def test_template_has_the_real_number_of_tokens_whatever_the_caption(pipeline):
    prefix = pipeline.tokenizer(TEMPLATE_PREFIX).input_ids
    suffix = pipeline.tokenizer(TEMPLATE_SUFFIX).input_ids
    assert (len(prefix), len(suffix)) == (TEMPLATE_PREFIX_TOKENS, TEMPLATE_SUFFIX_TOKENS)
    for caption in ["", "a photo of a cat", " leading space", "\nnewline", "北京, çédille 12", "!?"]:
        ids = pipeline.tokenizer(TEMPLATE_PREFIX + caption + TEMPLATE_SUFFIX).input_ids
        # A caption that begins with a newline joins the template's last one, here and in the real tokenizer.
        assert ids[: len(prefix)] == prefix or caption.startswith("\n")
        assert ids[-len(suffix) :] == suffix


def test_tokenizer_keeps_every_text(pipeline):
    for text in ["a photo of a cat", "  two  spaces\n\nlines\t", "北京 ğ 🚀 12345", "<|im_start|>user\n"]:
        assert pipeline.tokenizer.decode(pipeline.tokenizer(text).input_ids) == text


def test_token_ids_agree_with_the_text_encoder(pipeline):
    tokenizer, config = pipeline.tokenizer, pipeline.text_encoder.config
    assert tokenizer.pad_token == "<|endoftext|>"
    assert tokenizer.eos_token == "<|im_end|>"
    ids = tokenizer.convert_tokens_to_ids(SPECIAL_TOKENS)
    assert ids == list(range(ids[0], ids[0] + len(SPECIAL_TOKENS)))  # the real order
    assert ids[-1] == len(tokenizer) - 1 < config.text_config.vocab_size
    assert config.image_token_id == tokenizer.convert_tokens_to_ids("<|image_pad|>")
    assert config.text_config.pad_token_id == tokenizer.pad_token_id
    assert config.text_config.hidden_size == pipeline.transformer.config.joint_attention_dim


def test_real_shapes_where_the_project_relies_on_them(pipeline):
    assert pipeline.vae.config.z_dim == len(pipeline.vae.config.latents_mean) == len(pipeline.vae.config.latents_std)
    assert pipeline.vae_scale_factor == 8
    assert (pipeline.transformer.config.in_channels, pipeline.transformer.config.out_channels) == (64, 16)
    assert sum(pipeline.transformer.config.axes_dims_rope) == pipeline.transformer.config.attention_head_dim
    scheduler = pipeline.scheduler.config
    assert scheduler.use_dynamic_shifting
    assert (scheduler.base_shift, scheduler.max_shift, scheduler.shift_terminal) == (0.5, 0.9, 0.02)
    assert (scheduler.base_image_seq_len, scheduler.max_image_seq_len) == (256, 8192)


def test_activations_are_healthy(pipeline):
    """The prediction is of unit order and follows the image, the noise level and the caption."""
    import torch

    generator = torch.Generator().manual_seed(1)
    image = torch.randn(1, 64, 64, generator=generator)  # 8 × 8 tokens

    @torch.no_grad()
    def predict(caption: str, sigma: float) -> torch.Tensor:
        embeds, _ = pipeline.encode_prompt(caption)
        time = torch.tensor([sigma])
        return pipeline.transformer(image, embeds, timestep=time, img_shapes=[[(1, 8, 8)]]).sample

    base = predict("a cat", 0.5)
    assert 0.5 < base.std() < 2
    assert (predict("a cat", 0.9) - base).std() > 0.1
    assert (predict("a brick wall, seen from above", 0.5) - base).std() > 0.02


def test_diffusers_generates_an_image(pipeline):
    import torch

    image = pipeline(
        "a photo of a cat",
        negative_prompt=" ",
        height=48,
        width=64,
        num_inference_steps=2,
        generator=torch.Generator().manual_seed(0),
        output_type="np",
    ).images[0]
    assert image.shape == (48, 64, 3)
    assert image.std() > 0.02
    assert ((image > 0) & (image < 1)).mean() > 0.95  # not clipped: a comparison of pixels means something


def test_same_seed_same_bytes_and_shards(tmp_path: Path, tiny_model: Path):
    again = build_tiny_model(tmp_path / "again", seed=0)
    assert weight_hashes(again) == weight_hashes(tiny_model)
    other = build_tiny_model(tmp_path / "other", seed=1, max_shard_size="2MB", dtype="bfloat16")
    assert weight_hashes(other)["tokenizer/tokenizer.json"] == weight_hashes(tiny_model)["tokenizer/tokenizer.json"]
    index = json.loads((other / "transformer" / "diffusion_pytorch_model.safetensors.index.json").read_text())
    assert len(set(index["weight_map"].values())) > 1


def test_building_leaves_the_global_generator_alone(tmp_path: Path):
    import torch

    torch.manual_seed(7)
    expected = torch.rand(1)
    torch.manual_seed(7)
    build_tiny_model(tmp_path / "model", layers=1)
    assert torch.equal(torch.rand(1), expected)


def test_rotary_axes():
    assert rotary_axes(128) == (16, 56, 56)  # the real model's
    assert rotary_axes(32) == (4, 14, 14)
    with pytest.raises(ValueError, match="48"):
        rotary_axes(48)


def test_wrong_shape_is_one_clear_line(tmp_path: Path, capsys):
    assert main(["--output_path", str(tmp_path / "model"), "--head_dim", "40"]) == 2
    assert capsys.readouterr().err.startswith("error: head_dim 40 must be a multiple of 32")
    assert not (tmp_path / "model").exists()
