"""A run folder in the place of a LoRA file: the LoRA of its end, or of its newest checkpoint, in every command alike."""

import shutil

import pytest
import torch

from qwen_image.loading.model_files import ModelSource, resolve_model
from qwen_image.loading.weights import empty_transformer
from tests.helpers.training_run import losses, train
from train import convert_lora, merge_lora
from train.config.check_paths import split_weight
from train.config.run_files import lora_file
from train.lora.lora_file import read_lora

NO_TRIALS = ("--activation_checkpointing", "full", "--cuda_graphs", "off")
SCALES = {
    "plain": (),
    "alpha": ("--lora_alpha", "7"),
    "rslora": ("--lora_rslora", "true"),
    "dora": ("--lora_dora", "true"),
}


@pytest.fixture(scope="module")
def empty(small_model):
    return empty_transformer(resolve_model(ModelSource(str(small_model)), ("transformer",)))


@pytest.fixture(scope="module")
def done(small_model, small_data, tmp_path_factory):
    """A finished run with checkpoints of steps 2 and 4."""
    run = tmp_path_factory.mktemp("run folders") / "run"
    more = ("--checkpoint_steps", "2", "--learning_rate", "1e-2", "--lora_alpha", "7", *NO_TRIALS)
    assert train(small_model, small_data, run, *more) == 0
    return run


@pytest.fixture
def stopped(done, tmp_path):
    """The same as a run that was stopped after step 4."""
    run = shutil.copytree(done, tmp_path / "stopped")
    (run / "lora.safetensors").unlink()
    return run


@pytest.mark.parametrize("scale", SCALES)
def test_a_checkpoint_holds_what_the_file_of_its_step_holds(small_model, small_data, tmp_path, empty, scale):
    run = tmp_path / "run"
    more = ("--checkpoint_steps", "2", "--max_steps", "2", "--learning_rate", "1e-2", *SCALES[scale], *NO_TRIALS)
    assert train(small_model, small_data, run, *more) == 0
    expected = read_lora(run, empty)
    (run / "lora.safetensors").unlink()
    found = read_lora(run, empty)
    assert found.layers.keys() == expected.layers.keys() and found.is_dora == expected.is_dora == (scale == "dora")
    for name, layer in expected.layers.items():
        assert layer["lora_B"].any() and found.layers[name].keys() == layer.keys()
        for kind, tensor in layer.items():
            torch.testing.assert_close(found.layers[name][kind], tensor, rtol=1e-6, atol=0)
    assert f"the LoRA is that of step 2, from the checkpoint {run}/checkpoints/step-00000002" in found.notes


def test_which_of_a_runs_files(done, stopped):
    newest = stopped / "checkpoints" / "step-00000004"
    assert lora_file(done) == split_weight(f"{done}:0.5")[0] == done / "lora.safetensors"
    assert lora_file(stopped) == lora_file(stopped / "checkpoints") == lora_file(newest) == newest / "state.safetensors"
    (stopped / "checkpoints" / "latest").write_text("step-00000002\n")  # the run was taken back
    assert lora_file(stopped).parent.name == "step-00000002"
    shutil.rmtree(stopped / "checkpoints")
    (stopped / "lora-2.safetensors").touch()
    with pytest.raises(FileNotFoundError, match=r"without a checkpoint, as a run that isn't done: it has lora-2\.safe"):
        lora_file(stopped)


def test_every_command_takes_a_run_that_was_stopped(small_model, small_data, done, stopped, tmp_path, capfd):
    model = ["--model", str(small_model)]
    for name, run in (("done", done), ("stopped", stopped)):
        assert merge_lora.main([*model, "--lora", f"{run}:0.5", "--output_path", str(tmp_path / f"merged {name}")]) == 0
        converted = [str(run), str(tmp_path / f"{name}.safetensors"), "--format", "comfyui", *model]
        assert convert_lora.main(converted) == 0
        more = ("--lora_checkpoint", str(run), "--max_steps", "1", "--save_steps", "0", *NO_TRIALS)
        assert train(small_model, small_data, tmp_path / f"begun from {name}", *more) == 0
    said = capfd.readouterr()
    assert f"starting from {stopped}/checkpoints/step-00000004/state.safetensors: 1 of 1 layers" in said.out
    assert said.err.count("the LoRA is that of step 4, from the checkpoint") == 1  # merge_lora.py's
    assert said.out.count("the LoRA is that of step 4, from the checkpoint") == 2  # the others'
    assert losses(tmp_path / "begun from done") == losses(tmp_path / "begun from stopped")
    first, second = (read_of(tmp_path / f"{name}.safetensors") for name in ("done", "stopped"))
    assert first.keys() == second.keys()
    for key, tensor in first.items():
        torch.testing.assert_close(tensor, second[key], rtol=1e-6, atol=0)


def read_of(path):
    from safetensors.torch import load_file

    return load_file(path)


@pytest.mark.parametrize("damage", ["bytes", "facts", "cut"])
def test_a_damaged_checkpoint_is_refused_by_name(stopped, empty, damage):
    newest = stopped / "checkpoints" / "step-00000004"
    if damage == "facts":
        (newest / "state.json").write_text('{"step": 4}')
    else:
        tensors = newest / "state.safetensors"
        content = bytearray(tensors.read_bytes())
        content[-3] ^= 1
        tensors.write_bytes(content[: 50 if damage == "cut" else None])
    with pytest.raises(ValueError, match=r"checkpoint .*/step-00000004 is damaged: state\."):
        read_lora(stopped, empty)
    assert read_lora(stopped / "checkpoints" / "step-00000002", empty).layers
