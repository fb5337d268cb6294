"""The converting command: every spelling into every other, exactly; and what it refuses."""

import json

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from qwen_image.model.transformer import QwenImageTransformer, TransformerConfig
from tests.helpers.lora_styles import STYLES, write_style
from train import convert_lora
from train.lora.lora_file import read_lora
from train.lora.lora_format import SPELLINGS

NAMES = ("transformer_blocks.59.attn.to_q", "img_in", "proj_out")


@pytest.fixture(scope="module")
def real():
    """The real transformer's layers, without memory."""
    with torch.device("meta"):
        return QwenImageTransformer(TransformerConfig())


def layers(real, alpha):
    shapes = [real.get_submodule(name).weight.shape for name in NAMES]
    return {name: (*shape, rank, alpha) for name, shape, rank in zip(NAMES, shapes, (1, 2, 3), strict=True)}


def assert_first_rows_equal(layer, update):
    torch.testing.assert_close(layer["lora_B"][:8] @ layer["lora_A"], update[:8], atol=1e-4, rtol=1e-5)


def test_the_commands_formats_are_the_spellings():
    assert tuple(SPELLINGS) == convert_lora.FORMATS


@pytest.mark.parametrize("style", STYLES)
def test_every_spelling_becomes_every_other_without_a_model(real, tmp_path, style, capsys):
    source = tmp_path / "in.safetensors"
    updates = write_style(source, style, layers(real, 3))
    for name in SPELLINGS:
        output = tmp_path / f"{name}.safetensors"
        assert convert_lora.main([str(source), str(output), "--format", name]) == 0
        assert f"3 layers as {name} spells them, float32" in capsys.readouterr().out
        for layer, weights in read_lora(output, real).layers.items():
            assert_first_rows_equal(weights, updates[layer])
        keys = load_file(output).keys()
        assert SPELLINGS[name].key(NAMES[0], "lora_A") in keys
        assert any(key.endswith(".alpha") for key in keys) == (name == "kohya")


def test_diffusers_header_is_applied_once_and_other_facts_stay(real, tmp_path):
    first, second = tmp_path / "in.safetensors", tmp_path / "out.safetensors"
    updates = write_style(first, "transformer.", layers(real, 12), header=True)
    with safe_open(first, "pt") as file:
        metadata = file.metadata() | {"ss_tag": "kept"}
    save_file(load_file(first), first, metadata)
    convert_lora.convert(first, second, "diffusers")
    with safe_open(second, "pt") as file:
        metadata = file.metadata()
    assert metadata["ss_tag"] == "kept" and metadata["lora_format"] == "diffusers"
    assert "lora_adapter_metadata" not in metadata
    for layer, weights in read_lora(second, real).layers.items():
        assert_first_rows_equal(weights, updates[layer])


@pytest.mark.parametrize("alpha,dtype", [(2, torch.bfloat16), (3, torch.float32)])
def test_bfloat16_stays_where_the_scale_is_exact_in_it(real, tmp_path, alpha, dtype, capsys):
    name = "transformer_blocks.3.attn.to_k"
    state = {f"lora_unet_{name.replace('.', '_')}.lora_down.weight": torch.randn(4, 3072).bfloat16()}
    state[f"lora_unet_{name.replace('.', '_')}.lora_up.weight"] = torch.randn(3072, 4).bfloat16()
    state[f"lora_unet_{name.replace('.', '_')}.alpha"] = torch.tensor(float(alpha))
    save_file(state, tmp_path / "in.safetensors")
    flags = [str(tmp_path / "in.safetensors"), str(tmp_path / "out.safetensors"), "--format", "comfyui"]
    assert convert_lora.main(flags) == 0
    assert {tensor.dtype for tensor in load_file(tmp_path / "out.safetensors").values()} == {dtype}
    assert ("would round" in capsys.readouterr().out) == (dtype == torch.float32)


def dora_file(tiny_model, path, metadata=None):
    weight = load_file(tiny_model / "transformer" / "diffusion_pytorch_model.safetensors")["proj_out.weight"]
    generator = torch.Generator().manual_seed(0)
    state = {
        "transformer.proj_out.lora_A.weight": torch.randn(2, weight.shape[1], generator=generator),
        "transformer.proj_out.lora_B.weight": torch.randn(weight.shape[0], 2, generator=generator),
        "transformer.proj_out.lora_magnitude_vector": weight.norm(dim=1) * 1.1,
    }
    save_file(state, path, metadata)
    return path


@pytest.mark.parametrize(
    "make,more,message",
    [
        (lambda model, path: path, ["--format", "comfyui"], "no LoRA file at"),
        (dora_file, ["--format", "kohya", "--model", "MODEL"], "which kohya has no spelling for"),
        (dora_file, ["--format", "diffsynth", "--model", "MODEL"], "train/merge_lora.py"),
        (
            dora_file,
            ["--format", "comfyui"],
            "without --model a LoRA is taken as one of Qwen-Image",
        ),  # the tiny model's layer, no --model
    ],
    ids=["missing", "kohya", "diffsynth", "model"],
)
def test_refusals(tiny_model, tmp_path, capsys, make, more, message):
    source = make(tiny_model, tmp_path / "in.safetensors")
    more = [str(tiny_model) if part == "MODEL" else part for part in more]
    assert convert_lora.main([str(source), str(tmp_path / "out.safetensors"), *more]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and message in error and error.count("\n") == 1
    assert not (tmp_path / "out.safetensors").exists()


def test_a_dora_needs_its_base(real, tiny_model, tmp_path, capsys):
    layer = real.get_submodule("proj_out").weight.shape
    state = {
        "transformer.proj_out.lora_A.weight": torch.ones(1, layer[1]),
        "transformer.proj_out.lora_B.weight": torch.ones(layer[0], 1),
        "transformer.proj_out.lora_magnitude_vector": torch.ones(layer[0]),
    }
    save_file(state, tmp_path / "real.safetensors")
    with pytest.raises(ValueError, match="give it with --model"):
        convert_lora.convert(tmp_path / "real.safetensors", tmp_path / "out.safetensors", "comfyui")
    other = dora_file(tiny_model, tmp_path / "other.safetensors", {"base_model_fingerprint": "0123"})
    lines = convert_lora.convert(other, tmp_path / "out.safetensors", "comfyui", str(tiny_model))
    assert lines[0].startswith("warning: ") and "was trained on another base (0123)" in lines[0]
    from qwen_image.loading.model_files import ModelSource, resolve_model

    own = resolve_model(ModelSource(str(tiny_model)), ("transformer",)).fingerprint("transformer")
    facts = {"base_model_fingerprint": own, "preset_loras": "style.safetensors"}
    on_presets = dora_file(tiny_model, tmp_path / "presets.safetensors", facts)
    with pytest.raises(ValueError, match=r"preset LoRAs merged in \(style.safetensors\)"):
        convert_lora.convert(on_presets, tmp_path / "third.safetensors", "comfyui", str(tiny_model))


def test_what_is_there_is_not_overwritten_and_what_is_left_out_is_told(real, tmp_path, capsys):
    source = tmp_path / "in.safetensors"
    write_style(source, "none", layers(real, None))
    assert convert_lora.main([str(source), str(source), "--format", "comfyui"]) == 2
    assert "exists already" in capsys.readouterr().err
    assert convert_lora.main([str(source), str(tmp_path / "no" / "out"), "--format", "comfyui"]) == 2
    assert "there is no folder" in capsys.readouterr().err
    save_file(load_file(source) | {"lora_te_a.lora_down.weight": torch.ones(1)}, source, {"x": json.dumps(1)})
    assert convert_lora.main([str(source), str(tmp_path / "out"), "--format", "comfyui"]) == 0
    assert "1 weights of a text encoder are left out" in capsys.readouterr().out
