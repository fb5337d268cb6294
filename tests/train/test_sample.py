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


def test_several_loras_add_up_and_a_run_folder_stands_for_its_file(tiny_model, lora, tmp_path):
    """Half of it twice is all of it; a weight of 0 is none."""
    run = tmp_path / "run"
    run.mkdir()
    (run / "lora.safetensors").write_bytes(lora.read_bytes())
    for name, more in {
        "one": ["--lora", str(run)],
        "halves": ["--lora", f"{lora}:0.5", "--lora", f"{run}:0.5"],
        "and none": ["--lora", f"{lora}:0", "--lora", str(run)],
        "base": [],
    }.items():
        assert sample.main(flags(tiny_model, tmp_path / name, *more)) == 0
    one, halves, none, base = (
        pixels(tmp_path / name / "000-seed0.png").astype(int) for name in ("one", "halves", "and none", "base")
    )
    assert np.abs(one - base).mean() > 1
    assert np.abs(one - halves).max() <= 1 and np.abs(one - none).max() <= 1
    assert read_parameters(tmp_path / "halves" / "000-seed0.png")["lora"] == f"{lora}:0.5, {run}:0.5"


def test_doras_are_not_added(tmp_path):
    from train.lora.lora_file import LoraFile
    from train.lora.preset_loras import Preset, as_one

    dora = LoraFile(
        {"to_q": {"lora_A": torch.ones(2, 4), "lora_B": torch.ones(4, 2), "lora_magnitude_vector": torch.ones(4)}}, {}
    )
    preset = Preset(tmp_path / "d.safetensors", 1.0, dora)
    assert as_one([preset]) is dora
    with pytest.raises(ValueError, match=r"d\.safetensors is a DoRA and can't be added to others"):
        as_one([preset, preset])


@pytest.mark.parametrize(
    "more,message",
    [
        (["--seed", str(2**63)], "--seed must lie in 0 … 9223372036854775807"),
        (["--seed", "9" * 400], "--seed must lie in 0 …"),
        (["--seed", "-1"], "--seed must lie in 0 …"),
        (["--lora_strength", "nan"], "--lora_strength must be a finite number, got nan"),
        (["--lora_strength", "1e39"], "--lora_strength must lie in -1e+06 … 1e+06, got 1e+39"),
        (["--true_cfg_scale=-1e30"], "--true_cfg_scale must lie in -1e+06 … 1e+06, got -1e+30"),
        (["--lora", "x.safetensors:-1e39"], "a LoRA's weight must lie in -1e+06 … 1e+06, got -1e39"),
        (["--true_cfg_scale", "inf"], "--true_cfg_scale must be a finite number, got inf"),
        (
            ["--lora", "RUN"],
            "is a folder without lora.safetensors and without a checkpoint, as a run that isn't done: it has lora-5",
        ),
        (["--lora", "x.safetensors:nan"], "must be a number, got 'nan'"),
        (["--lora", "none.safetensors"], "--lora: no file at none.safetensors"),
    ],
)
def test_what_no_image_can_be_made_with(tiny_model, tmp_path, capsys, more, message):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "lora-5.safetensors").touch()
    more = [str(tmp_path / "run") if word == "RUN" else word for word in more]
    assert sample.main(flags(tiny_model, tmp_path / "out", *more)) == 2
    error = capsys.readouterr().err
    assert message in error and len(error) < 400 and not (tmp_path / "out").exists()


def test_an_image_of_nan_is_an_error(tiny_model, lora, tmp_path, capsys):
    """Each number within its limits, and yet too much together: no black picture, no exit code 0."""
    from safetensors.torch import load_file, save_file

    large = {key: tensor * (1e30 if "lora_B" in key else 1.0) for key, tensor in load_file(lora).items()}
    save_file(large, tmp_path / "large.safetensors")
    more = ["--lora", str(tmp_path / "large.safetensors"), "--lora_strength", "1e6"]
    assert sample.main(flags(tiny_model, tmp_path / "out", *more)) == 2
    assert "the image became NaN or infinite" in capsys.readouterr().err
    assert not list((tmp_path / "out").glob("*.png"))


def test_labels_of_any_length_are_quick():
    import time

    image = Image.new("RGB", (64, 64))
    began = time.monotonic()
    for label in ("a word " * 1600, "x" * 11_000, "é" * 11_000):
        make_grid([[image]], ["base"], [label])
    assert time.monotonic() - began < 2


def test_a_streamed_transformer_makes_the_same_image(tiny_model, lora, tmp_path, capsys):
    for name, more in {"resident": [], "some": ["--resident_blocks", "1"], "none": ["--resident_blocks", "0"]}.items():
        assert sample.main(flags(tiny_model, tmp_path / name, "--lora", str(lora), "--compare", *more)) == 0
    said = capsys.readouterr().err
    assert "blocks of the base come from host memory while they compute" in said
    for image in ("000-seed0.png", "000-seed0-base.png"):
        expected = pixels(tmp_path / "resident" / image)
        assert all(np.array_equal(pixels(tmp_path / name / image), expected) for name in ("some", "none"))


@pytest.mark.parametrize("precision", ["float8", "int8"])
def test_8_bits_are_the_same_from_every_home_and_near_the_exact_image(tiny_model, lora, tmp_path, precision):
    found = {}
    for name, more in {"exact": [], "resident": [], "none": ["--resident_blocks", "0"]}.items():
        asked = ["--base_precision", "dtype" if name == "exact" else precision]
        assert sample.main(flags(tiny_model, tmp_path / name, "--lora", str(lora), *asked, *more)) == 0
        found[name] = pixels(tmp_path / name / "000-seed0.png").astype(int)
    assert np.array_equal(found["resident"], found["none"])
    assert (
        np.abs(found["resident"] - found["exact"]).max() > 0 and np.abs(found["resident"] - found["exact"]).mean() < 8
    )
