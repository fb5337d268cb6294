"""The comparison of a LoRA run on a float8 base with one on the unquantised base; the whole of it, tiny, is a slow test."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from bench import float8_loss
from bench.float8_loss import MUST, Courses, base_alone
from bench.learned_model import LEFT_OUT, Recipe, batches, fresh_transformer, write_crops


def test_differences_are_relative_to_the_unquantised_run():
    exact = [2.0] * 100 + [1.0] * 100
    float8 = [2.0] * 100 + [1.0] * 80 + [1.02] * 20
    courses = Courses(exact, float8, [2.0] * 200)
    assert courses.overall == pytest.approx(0.4 / 300)
    assert courses.end == pytest.approx(0.4 / 50)
    assert courses.largest == (pytest.approx(0.02), 200)
    assert courses.fall == pytest.approx(0.5)
    assert "goal met" in "\n".join(courses.lines())
    assert "MISSED" in "\n".join(Courses(exact, [1.02 * loss for loss in exact], exact).lines())
    assert "must met" in "\n".join(Courses(exact, [0.995 * loss for loss in exact], exact).lines())


def test_few_steps_have_fewer_windows():
    lines = Courses([1.0, 2.0, 3.0], [1.0, 2.0, 3.3], [1.0, 2.0, 3.0]).lines()
    assert [line for line in lines if line.startswith("| 3–3 |")] == [
        "| 3–3 | 3.00000 | 3.00000 | 3.30000 | +10.000% |"
    ]
    assert sum(line.startswith("| ") for line in lines) == 2 + 3


def test_base_and_lora_see_different_photographs(tmp_path: Path):
    from PIL import Image

    from demo.photos import PHOTOS

    names = {}
    for left_out in (False, True):
        folder = tmp_path / str(left_out)
        count = write_crops(folder, left_out, side=32, crops=2)
        pictures = sorted(folder.glob("*.png"))
        assert count == len(pictures) == len(list(folder.glob("*.txt")))
        assert {Image.open(picture).size for picture in pictures} == {(32, 32)}
        names[left_out] = {picture.stem.rpartition("-")[0] for picture in pictures}
    assert names[True] | names[False] == {photo.name for photo in PHOTOS}
    assert not names[True] & names[False]
    assert names[True] == {photo.name for photo in PHOTOS if photo.source in LEFT_OUT}


def test_an_impossible_recipe_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    assert Recipe.for_device(True, layers=3, side=None) == Recipe(3, 8, 256, 1200, 16, "bfloat16")
    assert float8_loss.main(["--output", str(tmp_path), "--side", "100"]) == 2
    assert "error: side must be a multiple of 16, got 100" in capsys.readouterr().err
    (tmp_path / "precious").touch()
    assert float8_loss.main(["--output", str(tmp_path)]) == 2
    assert "choose another" in capsys.readouterr().err


def test_a_fresh_transformer_predicts_nothing_and_learns_everything():
    import torch

    from qwen_image.encoders.text_encoder import Prompt
    from train.step.flow_matching_module import FlowMatchingModule

    transformer = fresh_transformer(Recipe(2, 1, 32, 20, 2, "float32"), torch.device("cpu"))
    assert all(parameter.requires_grad and parameter.isfinite().all() for parameter in transformer.parameters())
    generator = torch.Generator().manual_seed(0)
    latents, noise = (torch.randn(2, 16, 1, 4, 4, generator=generator) for _ in range(2))
    prompt = Prompt(torch.randn(2, 5, 64, generator=generator), None)
    losses = FlowMatchingModule(transformer, "none", torch.float32)(latents, noise, torch.tensor([0.3, 0.9]), prompt)
    assert losses.tolist() == pytest.approx((noise - latents).square().flatten(1).mean(1).tolist())
    losses.mean().backward()
    assert transformer.proj_out.weight.grad is not None and transformer.proj_out.weight.grad.abs().max() > 0


@pytest.mark.slow
def test_the_loss_on_a_float8_base(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    """A tiny model really learns, the LoRA learns on top, and float8 leaves the loss where it was."""
    import torch

    base = ["--layers", "2", "--heads", "1", "--side", "64", "--learning_steps", "300"]
    flags = [*base, "--steps", "60", "--learning_rate", "2e-3"]
    assert float8_loss.main(["--output", str(tmp_path / "f8"), *flags]) == 0
    learned = json.loads((tmp_path / "f8" / "learned.json").read_text())["losses"]
    assert sum(learned[-20:]) < 0.6 * sum(learned[:20])
    courses = Courses(**json.loads((tmp_path / "f8" / "courses.json").read_text()))
    assert abs(courses.overall) <= MUST and abs(courses.end) <= MUST
    assert courses.float8 != courses.exact, "nothing was quantised"
    assert courses.exact[0] == pytest.approx(courses.base[0], rel=1e-5), "the base alone must see the run's draws"
    assert courses.fall > 0.02
    assert (tmp_path / "f8" / "loss.png").stat().st_size > 10_000
    assert "goal" in capsys.readouterr().out

    if not torch.cuda.is_available():
        recipe = Recipe(**json.loads((tmp_path / "f8" / "learned.json").read_text())["recipe"])
        options = float8_loss.argparse.Namespace(batch_size=4, steps=2)
        assert base_alone(tmp_path / "f8", recipe, options) == courses.base[:2]
    with batches(tmp_path / "f8" / "lora" / "encoded", 4, 0, torch.device("cpu")) as loader:
        assert next(iter(loader)).width == 64
