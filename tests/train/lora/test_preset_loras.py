"""LoRAs merged into the base: in the trainer and by merge_lora.py the same weights, which diffusers loads."""

from pathlib import Path

import pytest
import torch
from diffusers import QwenImageTransformer2DModel
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from demo.random_model import write_random_encoded, write_random_model
from qwen_image.loading.model_files import ModelSource, resolve_model
from qwen_image.model.conditioning import Prompt
from qwen_image.pipeline import load_transformer, predict_velocity
from tests.helpers.forked_ranks import run_ranks
from train import merge_lora, train_lora
from train.config.check_paths import split_weight
from train.lora.inject import attach_lora, set_lora_enabled
from train.lora.lora_file import read_lora
from train.lora.preset_loras import Preset, merge_presets

ROOT = Path(__file__).resolve().parents[3]
LAYERS = ("transformer_blocks.0.attn.to_q", "transformer_blocks.1.img_mlp.net.2", "proj_out", "img_in")


def transformer_of(model: Path, path: Path | None = None):
    source = ModelSource(str(model), transformer_path=path and str(path))
    return load_transformer(resolve_model(source, ("transformer",)), torch.float32)


def write_lora(path: Path, model: Path, seed: int, magnitude: bool = False) -> Path:
    generator = torch.Generator().manual_seed(seed)
    tensors = {}
    for name in LAYERS:
        weight = transformer_of(model).get_submodule(name).weight
        tensors[f"transformer.{name}.lora_A.weight"] = torch.randn(3, weight.shape[1], generator=generator) * 0.1
        tensors[f"transformer.{name}.lora_B.weight"] = torch.randn(weight.shape[0], 3, generator=generator) * 0.1
        if magnitude:
            tensors[f"transformer.{name}.lora_magnitude_vector"] = weight.norm(dim=1) * 1.1
    save_file(tensors, path)
    return path


@pytest.fixture(scope="module")
def loras(tiny_model, tmp_path_factory) -> list[Path]:
    folder = tmp_path_factory.mktemp("loras")
    return [write_lora(folder / f"{seed}.safetensors", tiny_model, seed) for seed in (1, 2)]


def velocity(transformer) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    latents = torch.randn(1, 24, 64, generator=generator)
    prompt = Prompt(torch.randn(1, 9, transformer.config.joint_attention_dim, generator=generator), None)
    with torch.no_grad():
        return predict_velocity(transformer, latents, torch.tensor([0.6]), prompt, 4, 6)


@pytest.mark.parametrize("file_bytes", [10**9, 200_000])
def test_the_merged_model_equals_base_and_lora(tiny_model, loras, tmp_path, file_bytes):
    count, _ = merge_lora.merge(str(tiny_model), [f"{loras[0]}:0.5"], tmp_path / "merged", file_bytes=file_bytes)
    files = sorted((tmp_path / "merged").glob("*.safetensors"))
    assert len(files) == count and (count > 1) == (file_bytes < 10**9)
    with_lora = transformer_of(tiny_model)
    base = velocity(with_lora)
    attach_lora(with_lora, read_lora(loras[0], with_lora), strength=0.5)
    expected, actual = velocity(with_lora), velocity(transformer_of(tiny_model, tmp_path / "merged"))
    assert (expected - base).abs().max() > 1e-2
    torch.testing.assert_close(actual, expected, atol=2e-5, rtol=0)
    set_lora_enabled(with_lora, False)
    assert torch.equal(velocity(with_lora), base)
    with safe_open(files[0], "pt") as file:
        metadata = file.metadata()
    assert metadata["base_model"] == tiny_model.name and '"weight": 0.5' in metadata["merged_loras"]


def test_diffusers_loads_the_merged_folder(tiny_model, loras, tmp_path, capsys):
    flags = ["--model", str(tiny_model), "--lora", str(loras[0]), "--lora", f"{loras[1]}:-0.5"]
    assert merge_lora.main([*flags, "--output_path", str(tmp_path / "merged")]) == 0
    theirs = QwenImageTransformer2DModel.from_pretrained(tmp_path / "merged")
    ours = transformer_of(tiny_model)
    presets = [Preset.read(text, ours) for text in (str(loras[0]), f"{loras[1]}:-0.5")]
    assert merge_presets(ours, presets) == len(LAYERS)
    state = ours.state_dict()
    assert state.keys() == theirs.state_dict().keys()
    assert all(torch.equal(tensor, state[name]) for name, tensor in theirs.state_dict().items())
    untouched = transformer_of(tiny_model).state_dict()
    changed = {name.removesuffix(".weight") for name in state if not torch.equal(state[name], untouched[name])}
    assert changed == set(LAYERS)
    assert merge_lora.main([*flags, "--output_path", str(tmp_path / "merged")]) == 2
    assert "exists already" in capsys.readouterr().err


def test_dora_is_merged_as_peft_computes_it(tiny_model, tmp_path):
    path = write_lora(tmp_path / "dora.safetensors", tiny_model, 3, magnitude=True)
    with_lora, ours = transformer_of(tiny_model), transformer_of(tiny_model)
    attach_lora(with_lora, read_lora(path, with_lora))
    merge_presets(ours, [Preset.read(str(path), ours)])
    torch.testing.assert_close(velocity(ours), velocity(with_lora), atol=5e-5, rtol=0)
    with pytest.raises(ValueError, match="has no weight but 1, got 0"):
        Preset.read(f"{path}:0.5", ours)


def test_path_and_weight(tmp_path):
    (tmp_path / "a:2").touch()
    assert split_weight("a.safetensors") == (Path("a.safetensors"), 1.0)
    assert split_weight("a.safetensors:0.8") == (Path("a.safetensors"), 0.8)
    assert split_weight(f"{tmp_path}/a:2") == (tmp_path / "a:2", 1.0)
    with pytest.raises(ValueError, match="must be a number, got 'much'"):
        split_weight("a.safetensors:much")


def train(outputs: dict[str, list[str]], model: Path, data: Path) -> list[int]:
    codes = []
    for output, more in outputs.items():
        flags = ["--model", str(model), "--data", str(data), "--output_path", output, "--dtype", "bfloat16"]
        flags += ["--lora_rank", "2", "--lora_target_modules", "to_q", "--num_workers", "0", "--compile", "off"]
        flags += ["--wandb_mode", "disabled", "--save_steps", "0", "--max_steps", "2", *more]
        codes.append(train_lora.main(flags))
    return codes


def test_training_on_a_preset_equals_training_on_the_merged_model(tmp_path):
    """Both ZeRO stages, two ranks: partitioned weights are merged whole."""
    model = tmp_path / "model"
    write_random_model(model, layers=2, heads=1, text_dim=64)
    lora = write_lora(tmp_path / "lora.safetensors", model, 1)
    data = write_random_encoded(tmp_path / "data", 8, 32, 32, prompt_tokens=6, text_dim=64)
    merge_lora.merge(str(model), [f"{lora}:0.5"], tmp_path / "merged")
    outputs = {}
    for stage in ("zero2", "zero3"):
        config = ["--deepspeed", str(ROOT / "ds_configs" / f"{stage}.json")]
        outputs[str(tmp_path / f"preset-{stage}")] = [*config, "--preset_lora_path", f"{lora}:0.5"]
        outputs[str(tmp_path / f"merged-{stage}")] = [*config, "--transformer_path", str(tmp_path / "merged")]
    outputs[str(tmp_path / "base")] = config
    assert run_ranks(2, train, outputs, model, data) == [0] * 5
    results = {Path(output).name: load_file(Path(output) / "lora.safetensors") for output in outputs}
    for name, tensor in results["merged-zero2"].items():
        assert torch.equal(tensor, results["preset-zero2"][name])
        assert torch.equal(results["merged-zero3"][name], results["preset-zero3"][name])
    assert any(not torch.equal(tensor, results["base"][name]) for name, tensor in results["merged-zero3"].items())
