"""The script that makes the drawing model, at its smallest: every part is there, loads as the real one does, and is told of."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from demo import score_drawings, train_drawing_model
from demo.drawing.card import FACTS
from demo.drawing.model_folder import bytes_of

TINY = ["--side", "32", "--pictures", "512", "--vae_steps", "2", "--steps", "2", "--judge_steps", "2"]
TINY += ["--batch", "8", "--score_pictures", "4", "--device", "cpu"]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("drawing") / "model"
    train_drawing_model.TEST_PICTURES, kept = 16, train_drawing_model.TEST_PICTURES
    assert train_drawing_model.main(["--output_path", str(folder), *TINY]) == 0
    train_drawing_model.TEST_PICTURES = kept
    return folder


def test_it_is_small_and_has_a_card(model: Path):
    assert bytes_of(model) <= 10_000_000
    facts = json.loads((model / FACTS).read_text())
    assert (facts["steps"], facts["vae_steps"], facts["pictures"], facts["batch"]) == (2, 2, 512, 8)
    card = (model / "README.md").read_text()
    assert "--pictures 512 --vae_steps 2 --steps 2" in card
    assert "nan" not in card.split("How well")[0]


def test_diffusers_loads_it_and_draws_the_same(model: Path):
    import torch
    from diffusers import QwenImagePipeline as Theirs

    from demo.drawing.scoring import draw, load_pipeline

    prompt = "a red circle on white"
    ours = draw(load_pipeline(model), [prompt], 32, steps=3, guidance=2.0)[0]
    pipeline = Theirs.from_pretrained(model, torch_dtype=torch.float32)
    pipeline.set_progress_bar_config(disable=True)
    theirs = pipeline(
        prompt,
        negative_prompt=" ",
        true_cfg_scale=2.0,
        height=32,
        width=32,
        num_inference_steps=3,
        generator=torch.Generator().manual_seed(0),
        output_type="np",
    ).images[0]
    assert abs(ours / 255 - theirs).max() < 0.02


def test_the_score_is_measured_again(model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    flags = ["--model", str(model), "--pictures", "4", "--side", "32", "--preview", str(tmp_path / "preview.png")]
    assert score_drawings.main(flags) == 0
    assert "held out pairs: shape" in capsys.readouterr().out
    assert (tmp_path / "preview.png").read_bytes().startswith(b"\x89PNG")
    assert score_drawings.main(["--model", str(tmp_path)]) == 2
    assert "classifier.safetensors is missing" in capsys.readouterr().err


@pytest.mark.parametrize(("flags", "message"), [(["--side", "40"], "multiple of 16"), (["--minutes", "0"], "above 0")])
def test_bad_flags_are_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str], flags: list[str], message: str):
    assert train_drawing_model.main(["--output_path", str(tmp_path / "new"), *flags]) == 2
    assert message in capsys.readouterr().err


def test_a_full_folder_is_left_alone(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    (tmp_path / "precious").touch()
    assert train_drawing_model.main(["--output_path", str(tmp_path)]) == 2
    assert "choose another --output_path" in capsys.readouterr().err
