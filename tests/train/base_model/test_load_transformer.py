"""The frozen base as configured: what is refused and how, presets before rounding, and the trainer with a float8 base."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from demo.random_model import write_random_encoded, write_random_model
from qwen_image.float8.linear import FLOAT8, Float8Linear
from qwen_image.loading.model_files import ModelSource, resolve_model
from qwen_image.noise_schedule import SigmaSchedule
from qwen_image.pipeline import load_transformer
from train import train_lora
from train.base_model.base_plan import BasePlan
from train.base_model.load_transformer import load_base
from train.config.train_config import TrainConfig
from train.config.zero_plan import ZeroPlan
from train.lora.preset_loras import Preset, merge_presets
from train.lora.spec import LoraSpec
from train.process.ranks import Ranks

ROOT = Path(__file__).resolve().parents[3]
CPU = torch.device("cpu")
ZERO2 = ZeroPlan(2)


def config_of(model, **options):
    return TrainConfig(**({"model": str(model), "data": "d", "deepspeed": "d", "output_path": "o"} | options))


def plan_of(config, zero=ZERO2):
    return BasePlan.from_config(config, zero, LoraSpec.from_config(config), Ranks(0, 1, 0, CPU))


def check(model, zero=ZERO2, **options):
    return plan_of(config_of(model, **options), zero).lines(CPU)


def test_refusals(tiny_model):
    assert check(tiny_model) == []
    assert "emulated" in check(tiny_model, base_precision="float8")[0]
    offloaded = ZeroPlan(3, offload_param=True)
    for options, zero, message in (
        ({"base_precision": "float8", "lora_dora": True}, ZERO2, "does not go with lora_dora"),
        ({"base_precision": "float8"}, ZeroPlan(2, casts_buffers=True), "buffer_dtype would round"),
        ({"lora_dora": True}, offloaded, "lora_dora needs whole, exact weights"),
        ({"lora_dora": True, "resident_blocks": 1}, ZERO2, "lora_dora needs whole, exact weights"),
        ({"lora_dora": True, "base_precision": "int8"}, ZERO2, "lora_dora needs whole, exact weights"),
        ({"resident_blocks": 9}, ZERO2, "9 blocks to keep on the GPU, but the model has"),
        ({"modulation_table": "on", "lora_target_modules": "img_mod.1"}, ZERO2, "lora_target_modules reaches it"),
        ({"base_precision": "int4"}, ZERO2, "base_precision"),
    ):
        with pytest.raises(ValueError, match=message):
            check(tiny_model, zero, **options)


@pytest.mark.parametrize("targets", ["to_q", "to_q,img_mod.1", "norm_out.linear"])
def test_the_table_gives_way_to_a_lora_there(tiny_model, targets):
    config = config_of(tiny_model, base_precision="float8", lora_target_modules=targets, dtype="float32")
    files = resolve_model(ModelSource(str(tiny_model)), ("transformer", "scheduler"))
    schedule = SigmaSchedule.from_config_file(files["scheduler"].folder / "scheduler_config.json")
    plan = plan_of(config)
    transformer = load_base(plan, files, schedule, Ranks(0, 1, 0, CPU))
    assert (transformer.modulation_table is not None) == (targets == "to_q")
    scales = sum(b.nbytes for b in transformer.buffers())
    held = sum(p.nbytes for p in transformer.parameters()) + scales
    assert plan.bytes(checkpointed_blocks=2) == held


def test_presets_are_merged_before_weights_are_rounded(tiny_model, tmp_path):
    files = resolve_model(ModelSource(str(tiny_model)), ("transformer", "scheduler"))
    exact = load_transformer(files, torch.float32)
    layers = ("transformer_blocks.0.attn.to_q", "transformer_blocks.1.img_mod.1", "proj_out")
    tensors = {}
    for name in layers:
        rows, columns = exact.get_submodule(name).weight.shape
        tensors[f"transformer.{name}.lora_A.weight"] = torch.randn(3, columns) * 0.1
        tensors[f"transformer.{name}.lora_B.weight"] = torch.randn(rows, 3) * 0.1
    save_file(tensors, tmp_path / "preset.safetensors")
    options = {"preset_lora_path": (f"{tmp_path / 'preset.safetensors'}:0.5",), "dtype": "float32"}
    config = config_of(tiny_model, base_precision="float8", modulation_table="off", **options)
    schedule = SigmaSchedule.from_config_file(files["scheduler"].folder / "scheduler_config.json")
    ours = load_base(plan_of(config), files, schedule, Ranks(0, 1, 0, CPU))
    merge_presets(exact, [Preset.read(config.preset_lora_path[0], exact)])
    for name in layers[1:]:
        torch.testing.assert_close(ours.get_submodule(name).weight, exact.get_submodule(name).weight)
    query = ours.get_submodule(layers[0])
    expected = Float8Linear(query.in_features, query.out_features)
    expected.quantize(exact.get_submodule(layers[0]).weight)
    assert torch.equal(query.weight.float() * query.scale.t(), expected.weight.float() * expected.scale.t())


def test_trainer_with_a_float8_base(tmp_path, capsys, monkeypatch):
    """ZeRO-2 leaves float8 weights alone, the loss is the unquantized run's within 2 %, and resuming needs the same base."""
    write_random_model(tmp_path / "model", layers=2, heads=2, text_dim=64)
    data = write_random_encoded(tmp_path / "data", 8, 64, 64, 9, 64)
    engines = []
    from train.engine import deepspeed_engine as engine

    initialize = engine.initialize

    def remember(*arguments):
        engines.append(initialize(*arguments))
        return engines[-1]

    monkeypatch.setattr(engine, "initialize", remember)

    def run(name, *more):
        flags = [
            "--deepspeed",
            str(ROOT / "ds_configs" / "zero2.json"),
            "--model",
            str(tmp_path / "model"),
            "--data",
            str(data),
        ]
        flags += ["--output_path", str(tmp_path / name), "--num_workers", "0", "--log_steps", "1", "--lora_rank", "4"]
        flags += ["--wandb_mode", "disabled", "--learning_rate", "1e-2", "--compile", "off", *more]
        code = train_lora.main(flags)
        rows = [json.loads(line) for line in (tmp_path / name / "metrics.jsonl").read_text().splitlines()]
        return code, [row["loss"] for row in rows if "loss" in row]

    code, plain = run("plain", "--max_steps", "4")
    assert code == 0
    code, ours = run("float8", "--max_steps", "4", "--base_precision", "float8", "--activation_checkpointing", "1")
    assert code == 0 and "emulated on the CPU" in capsys.readouterr().out
    assert ours == pytest.approx(plain, rel=0.02) and ours != plain
    layers = [module for module in engines[-1].module.modules() if isinstance(module, Float8Linear)]
    assert {layer.weight.dtype for layer in layers} == {FLOAT8} and {layer.scale.dtype for layer in layers} == {
        torch.float32
    }
    assert layers[-1].transposed is not None and layers[-1].transposed.dtype == FLOAT8
    trained = [p for p in engines[-1].module.parameters() if p.requires_grad]
    assert trained and {p.dtype for p in trained} == {torch.bfloat16}
    assert run("float8", "--max_steps", "5")[0] == 2
    assert 'model.base_precision is "float8" in the checkpoint, null in this run' in capsys.readouterr().err
    assert run("float8", "--max_steps", "5", "--base_precision", "float8")[0] == 0
