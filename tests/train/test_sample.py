"""The sampling command: images, their parameters, the comparison grid, and refusals."""

import numpy as np
import pytest
import torch
from PIL import Image

from qwen_image.pipeline import QwenImagePipeline
from train import sample
from train.lora.inject import inject_lora, lora_parameters
from train.lora.lora_file import save_lora
from train.lora.spec import LoraSpec
from train.watching.image_grid import make_grid, read_parameters


@pytest.fixture(scope="module")
def lora(tiny_model, tmp_path_factory):
    pipeline = QwenImagePipeline.from_pretrained(str(tiny_model), components=("transformer",), dtype=torch.float32)
    spec = LoraSpec(("proj_out", "to_q"), 4, 4)
    inject_lora(pipeline.transformer, spec)
    for name, parameter in lora_parameters(pipeline.transformer).items():
        if name.endswith("lora_B"):
            parameter.data.normal_(std=0.3, generator=torch.Generator().manual_seed(0))
    path = tmp_path_factory.mktemp("lora") / "my lora.safetensors"
    save_lora(path, lora_parameters(pipeline.transformer), spec, {}, torch.float32)
    return path


def flags(model, output, *more):
    size = ["--height", "32", "--width", "48", "--num_inference_steps", "2", "--dtype", "float32"]
    return ["--model", str(model), "--output_path", str(output), "--prompt", "a fox", *size, *more]


def pixels(path):
    return np.asarray(Image.open(path).convert("RGB"))


def test_comparison(tiny_model, lora, tmp_path):
    more = ["--lora", str(lora), "--compare", "--num_images", "2", "--seed", "5", "--prompt", "zwei Füchse"]
    assert sample.main(flags(tiny_model, tmp_path, *more)) == 0
    names = sorted(path.name for path in tmp_path.iterdir())
    assert names == sorted(
        ["grid.png"] + [f"{n:03d}-seed{s}{b}.png" for n, s in enumerate((5, 6, 5, 6)) for b in ("", "-base")]
    )
    with_lora, base = pixels(tmp_path / "000-seed5.png"), pixels(tmp_path / "000-seed5-base.png")
    assert with_lora.shape == (32, 48, 3) and np.abs(with_lora.astype(int) - base).mean() > 1
    parameters = read_parameters(tmp_path / "002-seed5.png")
    assert parameters["prompt"] == "zwei Füchse" and parameters["seed"] == 5 and parameters["lora"] == str(lora)
    assert read_parameters(tmp_path / "002-seed5-base.png")["lora"] is None
    grid = Image.open(tmp_path / "grid.png")
    assert grid.width > 4 * 48 and grid.height > 2 * 32


def test_base_image_is_the_pipelines(tiny_model, tmp_path):
    assert sample.main(flags(tiny_model, tmp_path, "--seed", "3")) == 0
    pipeline = QwenImagePipeline.from_pretrained(str(tiny_model), dtype=torch.float32)
    expected = pipeline.generate(["a fox"], height=32, width=48, num_inference_steps=2, seeds=[3])
    assert np.array_equal(pixels(tmp_path / "000-seed3.png"), expected[0].numpy())


def test_strength_zero_is_the_base(tiny_model, lora, tmp_path):
    more = ["--lora", str(lora), "--lora_strength", "0", "--compare"]
    assert sample.main(flags(tiny_model, tmp_path, *more)) == 0
    assert np.array_equal(pixels(tmp_path / "000-seed0.png"), pixels(tmp_path / "000-seed0-base.png"))


@pytest.mark.parametrize(
    "more,message",
    [
        (["--height", "100"], "positive multiples of 16, got 100×48"),
        (["--lora", "/no/lora.safetensors"], "no file at /no/lora.safetensors"),
        (["--compare"], "give one with --lora"),
        (["--num_inference_steps", "0"], "start at 1"),
        (["--output_path", "/proc/out"], "/proc/out"),
    ],
    ids=["size", "lora", "compare", "steps", "output"],
)
def test_bad_input_is_one_line(tiny_model, tmp_path, capsys, more, message):
    assert sample.main(flags(tiny_model, tmp_path, *more)) == 2
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert error.startswith("error: ") and message in error


def test_grid_places_images_and_cuts_long_labels():
    red, blue = (Image.new("RGB", (64, 32), colour) for colour in ("red", "blue"))
    grid = make_grid([[red, blue], [blue, red]], ["top", "bottom"], ["a very long prompt " * 9, "short"])
    array = np.asarray(grid).reshape(-1, 3)
    assert (array == (255, 0, 0)).all(1).sum() == 2 * 64 * 32 and (array == (0, 0, 255)).all(1).sum() == 2 * 64 * 32
