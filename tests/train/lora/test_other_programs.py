"""Our files in other programs: the table of docs/lora_files.md, cell by cell.

diffusers and DiffSynth load the files with their own code (DiffSynth is optional: pip install '.[peers]'); ComfyUI is no
package, so its naming rules and its formula stand in tests/helpers/comfyui.py.
"""

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import QwenImagePipeline as DiffusersPipeline
from safetensors.torch import load_file

from bench.peer import Shape
from bench.peers import unavailable
from qwen_image.encoders.text_encoder import Prompt
from qwen_image.pipeline import QwenImagePipeline, predict_velocity
from tests.helpers import comfyui
from train import convert_lora, merge_lora
from train.lora.inject import inject_lora, lora_parameters
from train.lora.lora_file import read_lora, save_lora
from train.lora.lora_format import SPELLINGS
from train.lora.preset_loras import Preset, merge_presets
from train.lora.spec import LoraSpec
from train.lora.targets import linear_layers

DOCS = Path(__file__).resolve().parents[3] / "docs" / "lora_files.md"
EVERYTHING = (
    "to_q",
    "to_k",
    "to_v",
    "add_q_proj",
    "add_k_proj",
    "add_v_proj",
    "to_out.0",
    "to_add_out",
    "img_mlp.net.0.proj",
    "img_mlp.net.2",
    "txt_mlp.net.0.proj",
    "txt_mlp.net.2",
    "img_mod.1",
    "txt_mod.1",
    "img_in",
    "txt_in",
    "proj_out",
    "norm_out.linear",
    "time_text_embed.timestep_embedder.linear_1",
    "time_text_embed.timestep_embedder.linear_2",
)
PROGRAMS = ("diffusers 0.42.1", "ComfyUI v0.3.77", "DiffSynth 2.1.12", "here")


def transformer_of(model: Path):
    pipeline = QwenImagePipeline.from_pretrained(
        str(model), components=("transformer",), dtype=torch.float32, device="cpu"
    )
    assert pipeline.transformer is not None
    return pipeline.transformer


KINDS: dict[str, dict[str, Any]] = {
    "LoRA": {},
    "DoRA": {"dora": True},
    "LoKr": {"type": "lokr", "factor": 4, "decompose_both": True},
}
NAMELESS = {"LoRA": (), "DoRA": ("diffsynth", "kohya"), "LoKr": ("diffsynth",)}  # spellings without a name for it


@pytest.fixture(scope="module")
def files(tiny_model, tmp_path_factory) -> dict[tuple[str, str], Path]:
    """(format, kind) → the file of one trained LoRA of every layer, rank 3, alpha 6."""
    folder = tmp_path_factory.mktemp("formats")
    found = {}
    for kind, more in KINDS.items():
        spec = LoraSpec(EVERYTHING, 3, 6, **more)
        transformer = transformer_of(tiny_model)
        assert len(inject_lora(transformer, spec)) == len(linear_layers(transformer_of(tiny_model)))
        generator = torch.Generator().manual_seed(1)
        for name, parameter in lora_parameters(transformer).items():
            if name.endswith("lora_B") or ".lokr_" in name:
                parameter.data.normal_(std=0.05 if kind != "LoKr" else 0.3, generator=generator)
            if name.endswith("lora_magnitude_vector"):
                parameter.data *= 1 + 0.2 * torch.rand(len(parameter), generator=generator)
        own = found["diffusers", kind] = folder / f"diffusers-{kind}.safetensors"
        save_lora(own, lora_parameters(transformer), spec, {}, torch.float32)
        for name in SPELLINGS:
            path = folder / f"{name}-{kind}.safetensors"
            if name != "diffusers" and name not in NAMELESS[kind]:
                convert_lora.convert(own, path, name, str(tiny_model))
                found[name, kind] = path
    return found


@pytest.fixture(scope="module")
def weights(tiny_model, files) -> dict[str, dict[str, torch.Tensor]]:
    """What every linear layer's weight must be with the LoRA, the DoRA, the LoKr: from the file that diffusers reads."""
    found = {}
    for kind in KINDS:
        transformer = transformer_of(tiny_model)
        merge_presets(transformer, [Preset.read(str(files["diffusers", kind]), transformer)])
        found[kind] = {name: transformer.get_submodule(name).weight.detach() for name in linear_layers(transformer)}
    return found


def in_diffusers(model: Path, path: Path) -> dict[str, torch.Tensor]:
    pipeline = DiffusersPipeline.from_pretrained(model)
    names = linear_layers(transformer_of(model))
    pipeline.load_lora_weights(path)
    pipeline.fuse_lora()
    pipeline.unload_lora_weights()
    return {name: pipeline.transformer.get_submodule(name).weight.detach() for name in names}


def in_comfyui(model: Path, path: Path) -> dict[str, torch.Tensor]:
    transformer = transformer_of(model)
    base = {name: transformer.get_submodule(name).weight.detach() for name in linear_layers(transformer)}
    patches, _ = comfyui.load(load_file(path), base)
    return {name: patches[name].applied(w.clone()) if name in patches else w for name, w in base.items()}


def in_diffsynth(model: Path, path: Path) -> dict[str, torch.Tensor]:
    dit = diffsynth_transformer(model)
    fuse_in_diffsynth(dit, path)
    names = linear_layers(transformer_of(model))
    return {name: dit.get_submodule(name).weight.detach() for name in names}


def diffsynth_transformer(model: Path) -> torch.nn.Module:
    from bench.peer_diffsynth import _diffsynth_transformer

    dit = _diffsynth_transformer(Shape(layers=2, heads=4, head_dim=32, joint_dim=64), torch.device("cpu")).float()
    dit.load_state_dict(load_file(model / "transformer" / "diffusion_pytorch_model.safetensors"))
    return dit


def fuse_in_diffsynth(dit: torch.nn.Module, path: Path) -> None:
    """What its pipeline's load_lora does without VRAM management."""
    from diffsynth.utils.lora.general import GeneralLoRALoader

    loader = GeneralLoRALoader()
    loader.fuse_lora_to_base_model(dit, loader.convert_state_dict(load_file(path)))


def here(model: Path, path: Path) -> dict[str, torch.Tensor]:
    transformer = transformer_of(model)
    merge_presets(transformer, [Preset.read(str(path), transformer)])
    return {name: transformer.get_submodule(name).weight.detach() for name in linear_layers(transformer)}


def verdict(program: str, model: Path, path: Path, expected: dict[str, torch.Tensor]) -> str:
    """`exact` (every weight within 2e-6), `nothing` (no layer changed), `wrong`, or `refused`."""
    apply = dict(zip(PROGRAMS, (in_diffusers, in_comfyui, in_diffsynth, here), strict=True))[program]
    try:
        actual = apply(model, path)
    except Exception:
        return "refused"
    base = {name: transformer_of(model).get_submodule(name).weight for name in list(expected)[:1]}
    if max((actual[name] - weight).abs().max() for name, weight in expected.items()) <= 2e-6:
        return "exact"
    return "nothing" if all(torch.equal(actual[name], weight) for name, weight in base.items()) else "wrong"


def documented() -> dict[tuple[str, str], dict[str, str]]:
    """(format, kind) → program → first word of its cell, from the table in docs/lora_files.md."""
    rows = [
        [cell.strip() for cell in line.strip("| ").split("|")] for line in DOCS.read_text().splitlines() if "|" in line
    ]
    heads = next(row for row in rows if row[0] == "`--lora_format`")
    found = {}
    for row in rows:
        name = re.fullmatch(r"`(\w+)`(, DoRA|, LoKr)?", row[0])
        if name and len(row) == len(heads):
            cells = dict(zip(heads[1:], (cell.split()[0].rstrip(",;:") for cell in row[1:]), strict=True))
            found[name[1], (name[2] or ", LoRA")[2:]] = cells
    return found


@pytest.mark.parametrize("program", PROGRAMS)
def test_the_table_in_the_docs_is_true(tiny_model, files, weights, program):
    if program.startswith("DiffSynth") and (reason := unavailable("diffsynth")):
        pytest.skip(reason)
    table = documented()
    assert table.keys() == files.keys()
    found = {key: verdict(program, tiny_model, path, weights[key[1]]) for key, path in files.items()}
    assert found == {key: cells[program] for key, cells in table.items()}


def test_comfyui_leaves_no_key_and_interpolates_a_doras_strength(tiny_model, files, weights):
    transformer = transformer_of(tiny_model)
    for name, kind in files:
        _, unused = comfyui.load(load_file(files[name, kind]), linear_layers(transformer))
        assert (unused == []) == (name != "diffusers" or kind != "DoRA"), "magnitude vectors alone are not known there"
    layer = "transformer_blocks.0.attn.to_q"
    base = transformer.get_submodule(layer).weight.detach()
    patch = comfyui.load(load_file(files["comfyui", "DoRA"]), [layer])[0][layer]
    expected = base + 0.4 * (weights["DoRA"][layer] - base)
    torch.testing.assert_close(patch.applied(base.clone(), 0.4), expected, atol=2e-6, rtol=0)


@pytest.mark.parametrize("name", SPELLINGS)
def test_the_velocity_in_diffusers_is_that_of_the_merged_model(tiny_model, files, tmp_path, name):
    merge_lora.merge(str(tiny_model), [str(files["diffusers", "LoRA"])], tmp_path / "merged")
    merged = transformer_of(tiny_model)
    merged.load_state_dict(load_file(tmp_path / "merged" / "diffusion_pytorch_model.safetensors"))
    generator = torch.Generator().manual_seed(0)
    latents, embeds = torch.randn(1, 12, 64, generator=generator), torch.randn(1, 9, 64, generator=generator)
    pipeline = DiffusersPipeline.from_pretrained(tiny_model)
    pipeline.load_lora_weights(files[name, "LoRA"])
    with torch.no_grad():
        ours = predict_velocity(merged, latents, torch.tensor([0.6]), Prompt(embeds, None), 3, 4)
        theirs = pipeline.transformer(
            hidden_states=latents,
            timestep=torch.tensor([0.6]),
            encoder_hidden_states=embeds,
            encoder_hidden_states_mask=torch.ones(1, 9, dtype=torch.long),
            img_shapes=[[(1, 3, 4)]],
            return_dict=False,
        )[0]
    torch.testing.assert_close(theirs, ours, atol=1e-6 * ours.abs().max().item(), rtol=1e-6)


@pytest.mark.parametrize("name", ["comfyui", "diffsynth"])
def test_the_velocity_in_diffsynth_is_that_of_the_merged_model(tiny_model, files, weights, name):
    if reason := unavailable("diffsynth"):
        pytest.skip(reason)
    from diffsynth.pipelines.qwen_image import model_fn_qwen_image

    loaded, merged = diffsynth_transformer(tiny_model), diffsynth_transformer(tiny_model)
    fuse_in_diffsynth(loaded, files[name, "LoRA"])
    for layer, weight in weights["LoRA"].items():
        merged.get_submodule(layer).weight.data = weight
    generator = torch.Generator().manual_seed(0)
    work = {
        "latents": torch.randn(1, 16, 6, 8, generator=generator),
        "timestep": torch.tensor([600.0]),
        "prompt_emb": torch.randn(1, 9, 64, generator=generator),
        "prompt_emb_mask": torch.ones(1, 9, dtype=torch.long),
        "height": 48,
        "width": 64,
    }
    with torch.no_grad():
        theirs, expected, base = (
            model_fn_qwen_image(dit, **work) for dit in (loaded, merged, diffsynth_transformer(tiny_model))
        )
    assert (expected - base).abs().max() > 0.05
    torch.testing.assert_close(theirs, expected, atol=1e-6 * expected.abs().max().item(), rtol=1e-6)


def test_the_dora_that_comfyui_reads_comes_back(tiny_model, files, tmp_path):
    """dora_scale → magnitude vectors → the same update; and a foreign dora_scale is refused (test_lora_file.py)."""
    back = tmp_path / "back.safetensors"
    convert_lora.convert(files["comfyui", "DoRA"], back, "diffusers", str(tiny_model))
    transformer = transformer_of(tiny_model)
    first, second = (read_lora(path, transformer).layers for path in (files["diffusers", "DoRA"], back))
    for name, layer in first.items():
        for kind, tensor in layer.items():
            torch.testing.assert_close(second[name][kind], tensor, atol=0, rtol=2e-6)


def test_a_lokr_in_diffusers_own_transformer(tiny_model, files, weights):
    """The pipeline's load_lora_weights knows no LoKr of Qwen-Image, the transformer's load_lora_adapter does."""
    pipeline = DiffusersPipeline.from_pretrained(tiny_model)
    with pytest.raises(ValueError, match="Invalid LoRA checkpoint"):
        pipeline.load_lora_weights(files["diffusers", "LoKr"])
    pipeline.transformer.load_lora_adapter(str(files["diffusers", "LoKr"]))
    for name, weight in weights["LoKr"].items():
        layer = pipeline.transformer.get_submodule(name)
        found = layer.get_base_layer().weight + layer.get_delta_weight(layer.active_adapters[0])
        torch.testing.assert_close(found.detach(), weight, atol=2e-6, rtol=0)
