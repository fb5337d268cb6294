"""Training and sampling edits through the commands, on tiny models of the real classes."""

import json
import re
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from data_prep import encode_shards, make_shards
from tests.helpers.edit_reference import picture
from train import sample, train_lora

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    """Five pairs of two source images each, in two sizes."""
    base = tmp_path_factory.mktemp("edits")
    lines = ["image,prompt,source_image,source_image_2"]
    (base / "in").mkdir()
    for number in range(5):
        size = (200, 140) if number % 2 else (140, 200)
        for name in "tab":
            picture(*size, number * 3 + "tab".index(name)).save(base / "in" / f"{name}{number}.png")
        lines.append(f't{number}.png,"make it {number}",a{number}.png,b{number}.png')
    (base / "in" / "metadata.csv").write_text("\n".join(lines))
    flags = ["--max_pixels", "4096", "--source_pixels", "4096", "--num_workers", "0"]
    assert make_shards.main(["--dataset_base_path", str(base / "in"), "--output_path", str(base / "out"), *flags]) == 0
    return base / "out"


@pytest.fixture(scope="module")
def encoded(images, tiny_edit_models):
    """For Qwen-Image-Edit-2511, without and with embeddings of the empty captions."""
    found = []
    for flags in ([], ["--empty_captions"]):
        output = images.parent / f"encoded{len(found)}"
        model = str(tiny_edit_models["edit-2511"])
        assert encode_shards.main(["--model", model, "--data", str(images), "--output_path", str(output), *flags]) == 0
        found.append(output)
    return found


def train(model, data, output, *more):
    return train_lora.main(
        [
            *("--model", str(model), "--data", str(data), "--output_path", str(output), "--dtype", "float32"),
            *("--deepspeed", str(ROOT / "ds_configs" / "zero2.json"), "--max_steps", "3", "--lora_rank", "2"),
            *("--num_workers", "0", "--log_steps", "1", "--wandb_mode", "disabled", "--device", "cpu", *more),
        ]
    )


def rows(output):
    names = ("step", "loss", "grad_norm", "validation_loss")
    lines = (output / "metrics.jsonl").read_text().splitlines()
    return [tuple(json.loads(line).get(name, -1.0) for name in names) for line in lines]


def test_online_equals_encoded(images, encoded, tiny_edit_models, tmp_path):
    more = ["--caption_dropout", "0.5", "--validation_samples", "1"]
    assert train(tiny_edit_models["edit-2511"], images, tmp_path / "images", *more) == 0
    assert train(tiny_edit_models["edit-2511"], encoded[1], tmp_path / "encoded", *more) == 0
    for online, stored in zip(rows(tmp_path / "images"), rows(tmp_path / "encoded"), strict=True):
        assert online == pytest.approx(stored, rel=1e-5)


def test_what_does_not_go_together_is_refused_by_name(images, encoded, tiny_model, tiny_edit_models, tmp_path, capsys):
    cases = [
        (
            tiny_edit_models["edit-2509"],
            encoded[0],
            [],
            "was encoded for Qwen-Image-Edit-2511, but .* is Qwen-Image-Edit-2509",
        ),
        (tiny_model, encoded[0], [], "was encoded for Qwen-Image-Edit-2511, but .* is Qwen-Image:"),
        (tiny_model, images, [], "has 2 source images, but Qwen-Image paints from text alone"),
        (tiny_edit_models["edit"], images, [], "has 2 source images, but Qwen-Image-Edit takes one source image"),
        (tiny_edit_models["edit-2511"], encoded[0], ["--caption_dropout", "0.1"], "encode_shards.py --empty_captions"),
        (tiny_edit_models["edit-2511"], encoded[0], ["--picture_positions", "consecutive"], "picture_positions = grid"),
        (tiny_edit_models["edit-2511"], images, ["--loader", "webdataset"], "holds pairs .* which loader webdataset"),
    ]
    for number, (model, data, flags, message) in enumerate(cases):
        assert train(model, data, tmp_path / str(number), *flags) == 2
        said = capsys.readouterr().err
        assert re.search(message, said), (message, said)


def make(model, output, *more):
    size = ["--source_pixels", "4096", "--num_inference_steps", "2", "--dtype", "float32", "--device", "cpu"]
    return sample.main(["--model", str(model), "--prompt", "make it blue", "--output_path", str(output), *size, *more])


def test_sampling_with_source_images(encoded, tiny_model, tiny_edit_models, tmp_path, capsys):
    model = tiny_edit_models["edit-2511"]
    assert train(model, encoded[0], tmp_path / "run") == 0
    for name, size in (("a", (200, 140)), ("b", (90, 120))):
        picture(*size).save(tmp_path / f"{name}.png")
    sources = ["--source_image", str(tmp_path / "a.png"), "--source_image", str(tmp_path / "b.png")]
    lora = ["--lora", str(tmp_path / "run"), "--compare"]
    assert make(model, tmp_path / "images", *sources, *lora) == 0
    image = Image.open(tmp_path / "images" / "000-seed0.png")
    assert image.size == (64, 64), "of the last source image, as the Plus pipeline has it"
    said = json.loads(image.info["parameters"])
    assert said["source_image"] == [str(tmp_path / "a.png"), str(tmp_path / "b.png")] and said["height"] == 64
    assert "warning" not in capsys.readouterr().err
    assert make(tiny_edit_models["edit-2509"], tmp_path / "other", *sources, *lora[:2]) == 0
    assert "was trained for Qwen-Image-Edit-2511, and this model is Qwen-Image-Edit-2509" in capsys.readouterr().err
    for base, flags, message in [
        (model, [], "has no source images, but Qwen-Image-Edit-2511 takes one to 3 source images"),
        (tiny_model, sources, "has 2 source images, but Qwen-Image paints from text alone"),
        (model, ["--source_image", str(tmp_path / "none.png")], "source image: no file at"),
        (model, ["--source_image", str(tmp_path / "run" / "config.yaml")], "cannot be read"),
    ]:
        assert make(base, tmp_path / "refused", *flags) == 2
        assert message in capsys.readouterr().err


def test_the_sources_change_the_image(tiny_edit_models, tmp_path):
    found = []
    for seed in (1, 2):
        picture(100, 100, seed).save(tmp_path / "a.png")
        assert make(tiny_edit_models["edit"], tmp_path / str(seed), "--source_image", str(tmp_path / "a.png")) == 0
        found.append(np.asarray(Image.open(tmp_path / str(seed) / "000-seed0.png")).astype(int))
    assert np.abs(found[0] - found[1]).max() > 5


def test_previews_and_prompt_files_with_source_images(encoded, tiny_edit_models, tmp_path, capsys):
    """While training and afterwards: each prompt's own images, the size of the last, sources above the results."""
    for name, size in (("a", (200, 140)), ("b", (90, 120))):
        picture(*size).save(tmp_path / f"{name}.png")
    sources = {"source_image": [str(tmp_path / "a.png")], "source_pixels": 4096}
    entries = [
        {"prompt": "make it blue", **sources},
        {
            "prompt": "both",
            **sources,
            "source_image": [*sources["source_image"], str(tmp_path / "b.png")],
            "height": 32,
            "width": 48,
        },
    ]
    file = tmp_path / "prompts.jsonl"
    file.write_text("\n".join(map(json.dumps, entries)))
    model, steps = tiny_edit_models["edit-2511"], ["--sample_num_inference_steps", "2", "--sample_prompts", str(file)]
    assert train(model, encoded[0], tmp_path / "run", *steps) == 0
    preview = tmp_path / "run" / "samples" / "step-00000003"
    assert [Image.open(preview / f"{n:02d}.png").size for n in (0, 1)] == [(64, 64), (48, 32)]
    assert json.loads(Image.open(preview / "00.png").info["parameters"])["source_image"] == sources["source_image"]
    assert Image.open(preview / "grid.png").height > 4 * 64, "two rows of sources, the base, the step"
    command = ["--model", str(model), "--lora", str(tmp_path / "run"), "--prompt", str(file), "--dtype", "float32"]
    command += ["--device", "cpu", "--num_inference_steps", "2", "--output_path", str(tmp_path / "images")]
    assert sample.main(command) == 0
    made = [np.asarray(Image.open(tmp_path / "images" / f"00{n}-seed0.png")).astype(int) for n in (0, 1)]
    assert [image.shape for image in made] == [(64, 64, 3), (32, 48, 3)]
    seen = np.asarray(Image.open(preview / "00.png")).astype(int)
    assert np.abs(seen - made[0]).max() <= 2, "the preview and the command make one image"
    capsys.readouterr()
    assert train(model, encoded[0], tmp_path / "refused", "--sample_prompts", "a prompt alone") == 2
    assert "sample_prompts: 'a prompt alone' has no source images, but Qwen-Image-Edit-2511" in capsys.readouterr().err
