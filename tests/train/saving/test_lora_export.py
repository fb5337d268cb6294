"""What a run writes: in the spelling that was asked for, a DoRA as ComfyUI reads it; and a run that is over says so."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from qwen_image.loading.model_files import ModelSource, resolve_model
from qwen_image.pipeline import load_transformer
from tests.helpers import comfyui
from tests.helpers.training_run import losses, train
from train.config.train_config import TrainConfig
from train.lora.lora_format import SPELLINGS
from train.lora.preset_loras import Preset, merge_presets
from train.lora.spec import LoraSpec

LAYER = "transformer_blocks.0.attn.to_q"


def base(model):
    return load_transformer(resolve_model(ModelSource(str(model)), ("transformer",)), torch.float32)


@pytest.mark.parametrize("name", SPELLINGS)
def test_a_run_writes_the_spelling_that_was_asked_for(small_model, small_data, tmp_path, name):
    assert train(small_model, small_data, tmp_path, "--lora_format", name, "--save_steps", "2") == 0
    for file in ("lora.safetensors", "lora-2.safetensors"):
        state = load_file(tmp_path / file)
        kinds = SPELLINGS[name].endings.keys() & {"lora_A", "lora_B", "alpha"}
        assert set(state) == {SPELLINGS[name].key(LAYER, kind) for kind in kinds}


@pytest.mark.parametrize("save_dtype", ["float32", "bfloat16"])
def test_a_dora_for_comfyui_is_the_dora_that_diffusers_reads(small_model, small_data, tmp_path, save_dtype, capsys):
    """Trained twice alike, written in both spellings: ComfyUI's formula gives PEFT's weights."""
    more = "--lora_dora", "true", "--lora_alpha", "3", "--learning_rate", "0.05", "--save_dtype", save_dtype
    assert train(small_model, small_data, tmp_path / "d", *more) == 0
    said = capsys.readouterr()
    assert "--format comfyui" in said.err + said.out and "train/merge_lora.py" in said.err + said.out
    assert train(small_model, small_data, tmp_path / "c", *more, "--lora_format", "comfyui") == 0
    assert losses(tmp_path / "c") == losses(tmp_path / "d")
    transformer = base(small_model)
    weight = transformer.get_submodule(LAYER).weight.detach().clone()
    merge_presets(transformer, [Preset.read(str(tmp_path / "d" / "lora.safetensors"), transformer)])
    expected = transformer.get_submodule(LAYER).weight.detach()
    assert (expected - weight).abs().max() > 1e-3
    patches, unused = comfyui.load(load_file(tmp_path / "c" / "lora.safetensors"), [LAYER])
    assert unused == [] and patches[LAYER].dora_scale.shape == (len(weight), 1)
    torch.testing.assert_close(patches[LAYER].applied(weight.clone()), expected, atol=2e-6, rtol=1e-6)
    again = base(small_model)
    merge_presets(again, [Preset.read(str(tmp_path / "c" / "lora.safetensors"), again)])
    torch.testing.assert_close(again.get_submodule(LAYER).weight.detach(), expected, atol=2e-6, rtol=1e-6)


@pytest.mark.parametrize("name", ["diffsynth", "kohya"])
def test_a_spelling_without_magnitudes_is_no_doras(name):
    with pytest.raises(ValueError, match=f"lora_format {name} has no name for the magnitudes of lora_dora"):
        TrainConfig(model="m", data="d", deepspeed="z.json", output_path="o", lora_dora=True, lora_format=name)


def test_the_effective_scale_is_told_where_alpha_is_not_the_rank():
    assert "scale 1, on 6 layers" in LoraSpec(("to_q",), 16, 16).line(6, 7)
    line = LoraSpec(("to_q",), 16, 1).line(6, 7)
    assert "scale 0.0625 (lora_alpha 1 / 16; lora_alpha 16 would give 1)" in line
    assert "scale 0.25 (lora_alpha 1 / √16; lora_alpha 16 would give 4)" in LoraSpec(
        ("to_q",), 16, 1, rslora=True
    ).line(6, 7)


@pytest.fixture
def finished(small_model, small_data, tmp_path):
    assert train(small_model, small_data, tmp_path / "run", "--lr_scheduler", "cosine") == 0
    return tmp_path / "run"


def start_again(model, data, run, monkeypatch, *more):
    """Exit code, and whether the model was read."""
    read = []
    from train.base_model import load_pipeline

    load = load_pipeline.load_base
    monkeypatch.setattr(load_pipeline, "load_base", lambda *given: read.append(1) or load(*given))
    return train(model, data, run, "--lr_scheduler", "cosine", *more), bool(read)


def test_a_finished_run_says_so_without_reading_the_model(small_model, small_data, finished, monkeypatch, capsys):
    before = {path: path.read_bytes() for path in finished.rglob("*") if path.is_file()}
    assert start_again(small_model, small_data, finished, monkeypatch) == (0, False)
    said = capsys.readouterr()
    assert f"already done: LoRA of step 4: {finished / 'lora.safetensors'}" in said.out + said.err
    assert {path: path.read_bytes() for path in finished.rglob("*") if path.is_file()} == before


def cut(path):
    path.write_bytes(path.read_bytes()[:-1])


def of_another_step(path):
    save_file(load_file(path), path, {"step": "3"})


@pytest.mark.parametrize("damage", [lambda path: path.unlink(), cut, of_another_step])
def test_a_final_file_that_is_not_whole_is_written_again(small_model, small_data, finished, monkeypatch, damage):
    state = {name: tensor.clone() for name, tensor in load_file(finished / "lora.safetensors").items()}
    damage(finished / "lora.safetensors")
    assert start_again(small_model, small_data, finished, monkeypatch) == (0, True)
    again = load_file(finished / "lora.safetensors")
    assert again.keys() == state.keys() and all(torch.equal(again[name], state[name]) for name in state)


def test_another_spelling_is_written_and_another_lora_refused(small_model, small_data, finished, monkeypatch, capsys):
    assert start_again(small_model, small_data, finished, monkeypatch, "--lora_format", "kohya") == (0, True)
    assert SPELLINGS["kohya"].key(LAYER, "alpha") in load_file(finished / "lora.safetensors")
    assert start_again(small_model, small_data, finished, monkeypatch, "--lora_rank", "3")[0] == 2
    assert "lora.rank is 2 in the checkpoint, 3 in this run" in capsys.readouterr().err


def test_a_checkpoint_of_another_run_does_not_finish_this_one(small_model, small_data, finished, tmp_path, monkeypatch):
    shutil.copytree(finished, tmp_path / "other", ignore=shutil.ignore_patterns("checkpoints"))
    more = "--resume", str(finished)
    assert start_again(small_model, small_data, tmp_path / "other", monkeypatch, *more) == (0, True)


def test_more_steps_tell_what_the_learning_rate_does_before_the_first_step(
    small_model, small_data, finished, monkeypatch, capsys
):
    assert (
        start_again(small_model, small_data, finished, monkeypatch, "--max_steps", "8", "--learning_rate", "1e-4")[0]
        == 0
    )
    said = capsys.readouterr()
    (line,) = [line for line in (said.out + said.err).splitlines() if "learning rate:" in line]
    assert line.endswith(
        "learning rate: 5e-05 from step 5 on (cosine, 8 steps); the earlier run (cosine, 4 steps) was at 1.46e-05 in step 4"
    )
    rows = [json.loads(line) for line in (finished / "metrics.jsonl").read_text().splitlines()]
    assert [row["lr"] for row in rows if "lr" in row and row["step"] == 5] == [pytest.approx(5e-5)]


def test_a_run_that_simply_goes_on_tells_nothing_of_it(small_model, small_data, tmp_path, monkeypatch, capsys):
    common = "--lr_scheduler", "cosine", "--checkpoint_steps", "2"
    assert train(small_model, small_data, tmp_path / "run", *common) == 0
    newest = max((tmp_path / "run" / "checkpoints").iterdir())
    shutil.rmtree(newest)
    capsys.readouterr()
    assert train(small_model, small_data, tmp_path / "run", *common) == 0
    said = capsys.readouterr()
    assert "resumed from" in said.out + said.err and "learning rate:" not in said.out + said.err


@pytest.mark.parametrize("damage,message", [("missing", "no file at"), ("rank", "rank 5"), ("nan", "NaN or infinite")])
def test_a_start_that_does_not_fit_is_refused_before_the_model_is_read(
    small_model, small_data, tmp_path, monkeypatch, capsys, damage, message
):
    path = tmp_path / "start.safetensors"
    width = base(small_model).get_submodule(LAYER).in_features
    rank = 5 if damage == "rank" else 2
    state = {f"{LAYER}.lora_A.weight": torch.ones(rank, width), f"{LAYER}.lora_B.weight": torch.ones(width, rank)}
    if damage == "nan":
        state[f"{LAYER}.lora_B.weight"] *= torch.nan
    if damage != "missing":
        save_file(state, path)
    more = "--lora_checkpoint", str(path)
    assert start_again(small_model, small_data, tmp_path / "run", monkeypatch, *more) == (2, False)
    assert message in capsys.readouterr().err
