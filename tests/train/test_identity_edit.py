"""The pixel test: a LoRA that was trained to change nothing gives the source back where it was, not a pixel beside."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from data_prep import encode_shards, make_shards
from demo import draw_edits
from qwen_image.encoders.source_images import read_source
from qwen_image.encoders.vae import uint8_from_pixels
from qwen_image.pipeline import QwenImagePipeline, encode_sources
from train import sample, train_lora

ROOT = Path(__file__).resolve().parents[2]
SIDE, STEPS = 96, 400


def shift_of(image: np.ndarray, other: np.ndarray) -> tuple[int, int]:
    """Where the circular cross-correlation of two grey pictures [H, W] is highest: by how many rows and columns they differ."""
    spectra = [np.fft.fft2(each - each.mean()) for each in (image, other)]
    correlation = np.fft.ifft2(spectra[0] * spectra[1].conj()).real
    row, column = np.unravel_index(correlation.argmax(), correlation.shape)
    return tuple(
        int((place + size // 2) % size - size // 2) for place, size in zip((row, column), image.shape, strict=True)
    )


def test_a_shift_is_seen():
    picture = np.random.default_rng(0).random((40, 48))
    assert shift_of(picture, picture) == (0, 0)
    assert shift_of(np.roll(picture, (3, -2), (0, 1)), picture) == (3, -2)


@pytest.mark.slow
def test_trained_on_identity_the_image_is_not_shifted(tiny_edit_models, tmp_path):
    """Through the commands. The tiny VAE was never trained: what it makes of the source is what the image is compared with."""
    model, flags = str(tiny_edit_models["edit"]), ["--side", str(SIDE), "--identity"]
    assert draw_edits.main(["--output_path", str(tmp_path / "pairs"), "--count", "48", *flags]) == 0
    assert (
        draw_edits.main(["--output_path", str(tmp_path / "new"), "--count", "3", "--first_seed", "1000", *flags]) == 0
    )
    size = [
        "--max_pixels",
        str(SIDE**2),
        "--source_pixels",
        str(SIDE**2),
        "--image_format",
        "png",
        "--num_workers",
        "0",
    ]
    paths = {name: str(tmp_path / name) for name in ("pairs", "shards", "encoded", "run")}
    assert make_shards.main(["--dataset_base_path", paths["pairs"], "--output_path", paths["shards"], *size]) == 0
    assert encode_shards.main(["--model", model, "--data", paths["shards"], "--output_path", paths["encoded"]]) == 0
    command = ["--model", model, "--data", paths["encoded"], "--output_path", paths["run"], "--dtype", "float32"]
    command += ["--deepspeed", str(ROOT / "ds_configs" / "zero2.json"), "--max_steps", str(STEPS), "--batch_size", "8"]
    command += [
        "--lora_target_modules",
        "attention,mlp,img_in,proj_out",
        "--lora_rank",
        "64",
        "--learning_rate",
        "2e-3",
    ]
    command += ["--lr_scheduler", "cosine", "--lr_warmup_steps", "20", "--weight_decay", "0", "--num_workers", "0"]
    command += ["--wandb_mode", "disabled", "--device", "cpu", "--save_steps", "0"]
    assert train_lora.main(command) == 0
    losses = [json.loads(line).get("loss") for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    losses = [loss for loss in losses if loss is not None]
    assert losses[-1] < 0.5 * losses[0]
    vae = QwenImagePipeline.from_pretrained(model, components=("vae",), dtype=torch.float32).vae
    for number in range(3):
        source, output = tmp_path / "new" / "source" / f"{number:03d}.png", tmp_path / f"image{number}"
        command = [
            "--model",
            model,
            "--lora",
            paths["run"],
            "--prompt",
            "change nothing",
            "--source_image",
            str(source),
        ]
        command += ["--source_pixels", str(SIDE**2), "--num_inference_steps", "12", "--true_cfg_scale", "1"]
        assert sample.main([*command, "--dtype", "float32", "--device", "cpu", "--output_path", str(output)]) == 0
        image = np.asarray(Image.open(output / "000-seed0.png").convert("L")).astype(float)
        latents = encode_sources(vae, [[read_source(source, SIDE**2)]])[0]
        expected = np.asarray(Image.fromarray(uint8_from_pixels(vae.decode(latents))[0].numpy()).convert("L")).astype(
            float
        )
        assert np.corrcoef(image.ravel(), expected.ravel())[0, 1] > 0.5, "it must be the source at all"
        assert shift_of(image, expected) == (0, 0)
