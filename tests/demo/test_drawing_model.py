"""The model that the repository carries draws what captions say; a LoRA teaches it something new and leaves the rest."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from demo.drawing.card import FACTS
from demo.drawing.classifier import FILE, load, score
from demo.drawing.model_folder import bytes_of
from demo.pictures.painting import paint
from demo.pictures.random_scenes import random_scene
from demo.run import LORA, MODEL, SIDE

pytestmark = pytest.mark.skipif(
    not (MODEL / "model_index.json").is_file(),
    reason=f"no weights in {MODEL.name}/: python demo/train_drawing_model.py makes them",
)
LORA_STEPS = 350
CLASSIFIER_AT_LEAST = 0.95  # of its answers on drawn pictures
SCORE_AT_LEAST = 0.8  # of the classifier's answers on what the model drew of held-out pairs


def test_it_is_small():
    assert bytes_of(MODEL) <= 10_000_000
    assert json.loads((MODEL / FACTS).read_text())["bytes"] == pytest.approx(bytes_of(MODEL), rel=0.01)


def test_the_classifier_knows_drawn_pictures():
    scenes = [random_scene(4 * 10**9 + i, wanted_held_out=i % 2 == 1) for i in range(200)]
    shares = score(load(MODEL / FILE), np.stack([paint(scene, SIDE) for scene in scenes]), scenes)
    assert shares["mean"] >= CLASSIFIER_AT_LEAST
    assert shares["shape"] >= CLASSIFIER_AT_LEAST
    assert shares["color"] >= CLASSIFIER_AT_LEAST


def test_the_vae_is_sharp():
    """An edge between two colors takes three pixels at most; blocks of a latent's 8 pixels would give an eighth."""
    import torch

    from demo.drawing.scoring import load_pipeline
    from qwen_image.encoders.vae import pixels_from_uint8, uint8_from_pixels

    drawn = np.stack([paint(random_scene(5 * 10**9 + i), SIDE) for i in range(8)])
    vae = load_pipeline(MODEL).vae
    assert vae is not None
    pixels = pixels_from_uint8(torch.from_numpy(drawn).permute(0, 3, 1, 2))
    decoded = uint8_from_pixels(vae.decode(vae.encode(pixels))).numpy()
    assert np.abs(decoded.astype(int) - drawn).mean() < 8
    steepness = [np.abs(np.diff(pictures.astype(int), axis=2)).max((1, 2, 3)).mean() for pictures in (decoded, drawn)]
    assert steepness[0] > steepness[1] / 3


def test_it_draws_pairs_that_it_never_saw():
    from demo.drawing.scoring import draw, load_pipeline, wanted_scenes

    scenes, prompts = wanted_scenes(24, held_out=True)
    pictures = draw(load_pipeline(MODEL), prompts, SIDE, steps=16)
    shares = score(load(MODEL / FILE), pictures, scenes)
    assert shares["mean"] >= SCORE_AT_LEAST, shares


def test_a_lora_learns_a_subject_and_a_style_and_leaves_the_rest(tmp_path: Path):
    """36 drawn pictures through the real commands; probes on the classifier's features say what the pictures show."""
    from data_prep import encode_shards, make_shards
    from demo.drawing.trial import try_lora
    from demo.pictures.new_things import write_new_things
    from tests.helpers.training_run import train

    write_new_things(tmp_path / "pictures", side=SIDE)
    flags = ["--dataset_base_path", str(tmp_path / "pictures"), "--output_path", str(tmp_path / "shards")]
    flags += ["--height", str(SIDE), "--width", str(SIDE), "--image_format", "png", "--num_workers", "0"]
    assert make_shards.main(flags) == 0
    flags = ["--model", str(MODEL), "--data", str(tmp_path / "shards"), "--output_path", str(tmp_path / "encoded")]
    assert encode_shards.main([*flags, "--dtype", "float32"]) == 0
    more = [word for name, value in LORA.items() for word in (f"--{name}", str(value))]
    more += ["--max_steps", str(LORA_STEPS), "--batch_size", "4", "--log_steps", "20", "--save_steps", "0"]
    assert train(MODEL, tmp_path / "encoded", tmp_path / "run", *more) == 0
    trial = try_lora(MODEL, tmp_path / "run" / "lora.safetensors", SIDE)
    print("\n".join(trial.lines()))
    assert not trial.failures()
