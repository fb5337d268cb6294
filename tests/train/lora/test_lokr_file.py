"""LoKr files of other programs: ComfyUI's formula layer by layer, in every command; and the reason for what is refused."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from qwen_image.loading.model_files import ModelSource, resolve_model
from qwen_image.model.conditioning import Prompt
from qwen_image.pipeline import load_transformer, predict_velocity
from tests.helpers import comfyui
from tests.helpers.lora_commands import COMMANDS, give_to
from tests.helpers.small_transformer import small_transformer
from tests.helpers.training_run import train
from train import convert_lora, merge_lora
from train.lora.inject import attach_lora, inject_lora, lora_parameters, start_from
from train.lora.lokr import shapes, update_of
from train.lora.lora_file import read_lora, write_lora
from train.lora.preset_loras import Preset, merged
from train.lora.spec import LoraSpec
from train.lora.targets import base_layer, linear_layers

BLOCK = "transformer_blocks.0."
NAMES = (BLOCK + "attn.to_q", BLOCK + "img_mlp.net.0.proj", BLOCK + "txt_mlp.net.2", "proj_out", "img_in")
Q = BLOCK + "attn.to_q"
PREFIXES = {  # ComfyUI's names of a layer
    "lycoris_": True,
    "lora_unet_": True,
    "diffusion_model.": False,
    "transformer.": False,
    "": False,
}
FORMATS = ("diffusers", "comfyui", "kohya")


@pytest.fixture(scope="module")
def transformer() -> Any:
    return small_transformer()


def divisors(number: int) -> list[int]:
    return [part for part in range(1, number + 1) if number % part == 0]


@st.composite
def foreign_layer(draw: Any, outputs: int, inputs: int) -> tuple[dict[str, torch.Size], float | None]:
    """Any factors of both sides, each whole or of any rank, with an alpha or without one."""
    a, c = draw(st.sampled_from(divisors(outputs))), draw(st.sampled_from(divisors(inputs)))
    sizes = {}
    for name, rows, columns in (("lokr_w1", a, c), ("lokr_w2", outputs // a, inputs // c)):
        if draw(st.booleans()):
            sizes[name] = torch.Size((rows, columns))
        else:
            rank = draw(st.integers(1, 5))
            sizes |= {f"{name}_a": torch.Size((rows, rank)), f"{name}_b": torch.Size((rank, columns))}
    return sizes, draw(st.one_of(st.none(), st.sampled_from([0.5, 1.0, 3.0, 16.0])))


def key_of(prefix: str, name: str, kind: str) -> str:
    return f"{prefix}{name.replace('.', '_') if PREFIXES[prefix] else name}.{kind}"


@settings(max_examples=60, deadline=None)
@given(data=st.data(), prefix=st.sampled_from(sorted(PREFIXES)), names=st.sets(st.sampled_from(NAMES), min_size=1))
def test_every_layer_is_what_comfyui_makes_of_it(
    transformer: Any, tmp_path_factory: pytest.TempPathFactory, data: Any, prefix: str, names: set[str]
) -> None:
    """Read, merged as a preset, attached, and written again in each format that has names for it."""
    folder, state = tmp_path_factory.mktemp("foreign"), {}
    generator = torch.Generator().manual_seed(0)
    for name in sorted(names):
        base = base_layer(transformer, name)
        sizes, alpha = data.draw(foreign_layer(base.out_features, base.in_features))
        state |= {key_of(prefix, name, kind): torch.randn(size, generator=generator) for kind, size in sizes.items()}
        if alpha is not None:
            state[key_of(prefix, name, "alpha")] = torch.tensor(alpha)
    path = folder / "foreign.safetensors"
    save_file(state, path)
    patches, unused = comfyui.load(state, linear_layers(transformer))
    assert unused == [] and patches.keys() == names
    expected = {name: patch.applied(torch.zeros_like(base_layer(transformer, name).weight))
                for name, patch in patches.items()}  # fmt: skip
    lora, preset = read_lora(path, transformer), Preset.read(f"{path}:0.5", transformer)
    attached = small_transformer()
    attach_lora(attached, lora)
    x = {name: torch.randn(3, base_layer(transformer, name).in_features, generator=generator) for name in names}
    for name, update in expected.items():
        close = {"atol": 1e-5 * max(1.0, update.abs().max().item()), "rtol": 1e-5}
        torch.testing.assert_close(update_of(lora.layers[name], update.device), update, **close)
        weight = base_layer(transformer, name).weight
        torch.testing.assert_close(merged(weight, name, [preset]) - weight, update / 2, **close)
        plain, with_it = transformer.get_submodule(name)(x[name]), attached.get_submodule(name)(x[name])
        torch.testing.assert_close(with_it - plain, x[name] @ update.t(), atol=20 * close["atol"], rtol=1e-4)
    for name in FORMATS:
        write_lora(folder / name, lora.layers, name, {}, torch.float32)
        again, unused = comfyui.load(load_file(folder / name), linear_layers(transformer))
        assert unused == [] and read_lora(folder / name, transformer).layers.keys() == names
        for layer, update in expected.items():
            found = again[layer].applied(torch.zeros_like(update))
            torch.testing.assert_close(found, update, atol=1e-5 * max(1.0, update.abs().max().item()), rtol=1e-5)


def lokr(name: str = f"lycoris_{Q.replace('.', '_')}", **changes: Any) -> dict[str, torch.Tensor]:
    """A LoKr of a 32×32 layer: w1 whole, 4×4; w2 of rank 2, 8×8."""
    own = {"lokr_w1": torch.ones(4, 4), "lokr_w2_a": torch.ones(8, 2), "lokr_w2_b": torch.ones(2, 8)} | changes
    return {f"{name}.{kind}": tensor for kind, tensor in own.items() if tensor is not None}


NAN = torch.full((4, 4), torch.nan)
REFUSED = {
    "NaN": (lokr(lokr_w1=NAN), f"lokr_w1 of {Q} has values that are NaN or infinite"),
    "infinite": (lokr(lokr_w2_b=torch.full((2, 8), torch.inf)), f"lokr_w2_b of {Q} has values"),
    "half w2": (lokr(lokr_w2_a=None), "a LoKr without a whole lokr_w2"),
    "other half of w2": (lokr(lokr_w2_b=None), "a LoKr without a whole lokr_w2"),
    "no w1": (lokr(lokr_w1=None), "a LoKr without a whole lokr_w1"),
    "half w1": (lokr(lokr_w1=None, lokr_w1_a=torch.ones(4, 2)), "a LoKr without a whole lokr_w1"),
    "w2 twice": (lokr(lokr_w2=torch.ones(8, 8)), "has lokr_w2 and lokr_w2_a, lokr_w2_b: which one counts"),
    "a LoRA besides": (
        lokr() | {f"{Q}.lora_A.weight": torch.ones(2, 32), f"{Q}.lora_B.weight": torch.ones(32, 2)},
        "has a LoKr and lora_A, lora_B: which one counts",
    ),
    "ranks differ": (lokr(lokr_w2_b=torch.ones(3, 8)), "lokr_w2_a has rank 2, lokr_w2_b has rank 3"),
    "rank 0": (lokr(lokr_w2_a=torch.ones(8, 0), lokr_w2_b=torch.ones(0, 8)), "has rank 0 in lokr_w2"),
    "another width": (lokr(lokr_w1=torch.ones(6, 4)), r"made for a 48×32 layer \(6×4 by 8×8\), but this model's is 32×32"),
    "sides exchanged": (lokr(lokr_w1=torch.ones(2, 8)), r"made for a 16×64 layer"),
    "a vector": (lokr(lokr_w1=torch.ones(16)), r"has shape \[16\]; .* matrices"),
    "a convolution": (lokr(lokr_w1=torch.ones(4, 4, 1, 1)), r"has shape \[4, 4, 1, 1\]; .* matrices"),
    "integers": (lokr(lokr_w1=torch.ones(4, 4).int()), "holds I32 numbers"),
    "two alphas": (lokr(alpha=torch.ones(2)), "an alpha is one number"),
    "an infinite alpha": (lokr(alpha=torch.tensor(torch.inf)), f"alpha of {Q} has values"),
    "too large": (lokr(alpha=torch.tensor(3e38), lokr_w1=torch.full((4, 4), 1e9)), "lokr_w1 of .* is no longer finite"),
    "Tucker": (lokr(lokr_t2=torch.ones(2, 2, 3, 3)), "a third matrix"),
    "DoRA": (lokr(dora_scale=torch.ones(32, 1)), "a DoRA whose formula the file doesn't tell"),
    "joined rows": (lokr(row_offset=torch.tensor(3)), "rows of a LoKr over joined projections"),
    "another model": (lokr("lycoris_double_blocks_0_attn_q"), "the file belongs to another model"),
    "two spellings": (lokr() | lokr(f"transformer.{Q}"), "two spellings of one weight"),
    "LoHa": ({f"lycoris_{Q.replace('.', '_')}.hada_w1_a": torch.ones(2, 2)}, "a LoHa"),
    "OFT": ({f"lycoris_{Q.replace('.', '_')}.oft_blocks": torch.ones(2, 2)}, "an OFT"),
    "GLoRA": ({f"diffusion_model.{Q}.a1.weight": torch.ones(2, 2)}, "a GLoRA"),
    "whole": ({f"diffusion_model.{Q}.diff": torch.ones(32, 32)}, "a whole weight's difference"),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_refused_for_its_own_reason_and_in_one_line(transformer: Any, tmp_path: Path, case: str) -> None:
    tensors, message = REFUSED[case]
    path = tmp_path / "foreign.safetensors"
    save_file({key: value.contiguous() for key, value in tensors.items()}, path)
    with pytest.raises(ValueError, match=message) as error:
        read_lora(path, transformer)
    assert str(path) in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize("case", ["NaN", "half w2", "another width", "w2 twice"])
@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_refuses_it_with_one_line_and_writes_nothing(
    small_model: Path, small_data: Path, tmp_path: Path, capsys: Any, command: str, case: str
) -> None:
    path, output = tmp_path / "foreign.safetensors", tmp_path / "out"
    save_file({key: value.contiguous() for key, value in REFUSED[case][0].items()}, path)
    code = give_to(command, path, small_model, small_data, output, "--lora_type", "lokr")
    (error,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert code == 2 and str(path) in error
    assert not output.exists() or not any(output.iterdir())


@pytest.mark.parametrize("name", FORMATS)
def test_every_format_becomes_every_other(tmp_path: Path, name: str, capsys: Any) -> None:
    """Of Qwen-Image's own sizes, without a model; what has no name for it is refused, naming the way that works."""
    from qwen_image.model.transformer import QwenImageTransformer, TransformerConfig

    with torch.device("meta"):
        real = QwenImageTransformer(TransformerConfig())
    layer = "transformer_blocks.59.attn.to_q"
    generator = torch.Generator().manual_seed(0)
    weights = {kind: torch.randn(size, generator=generator) for kind, size in shapes(3072, 3072, 4, 8, True).items()}
    write_lora(tmp_path / "in", {layer: weights}, name, {"step": "3"}, torch.float32)
    for other in FORMATS:
        assert convert_lora.main([str(tmp_path / "in"), str(tmp_path / other), "--format", other]) == 0
        assert f"1 layers as {other} spells them, float32" in capsys.readouterr().out
        found = read_lora(tmp_path / other, real).layers[layer]
        assert found.keys() == weights.keys()
        assert all(torch.equal(found[kind], weights[kind]) for kind in weights)
        with safe_open(tmp_path / other, "pt") as file:
            facts = file.metadata()
        assert facts["lora_type"] == "lokr" and facts["step"] == "3" and facts["lokr_scale_in_w1"] == "included"
        assert "lora_scale_in_lora_B" not in facts
    assert convert_lora.main([str(tmp_path / "in"), str(tmp_path / "out"), "--format", "diffsynth"]) == 2
    assert "is a LoKr, which diffsynth has no spelling for: merge it" in capsys.readouterr().err


def test_bfloat16_stays_where_the_scale_is_exact_in_it(tmp_path: Path, small_model: Path, capsys: Any) -> None:
    rank, exact = {"lokr_w2_a": torch.randn(8, 2), "lokr_w2_b": torch.randn(2, 16), "lokr_w1": torch.randn(16, 8)}, {}
    for alpha in (1.0, 3.0):
        path = tmp_path / f"{alpha}"
        state = {f"diffusion_model.{Q}.{kind}": tensor.bfloat16() for kind, tensor in rank.items()}
        save_file(state | {f"diffusion_model.{Q}.alpha": torch.tensor(alpha)}, path)
        flags = ["--format", "diffusers", "--model", str(small_model)]
        assert convert_lora.main([str(path), f"{path}-out", *flags]) == 0
        exact[alpha] = {tensor.dtype for tensor in load_file(f"{path}-out").values()}
        assert ("would round w1" in capsys.readouterr().out) == (alpha == 3.0)
    assert exact == {1.0: {torch.bfloat16}, 3.0: {torch.float32}}


def test_the_header_of_pefts_config_is_applied(transformer: Any, tmp_path: Path) -> None:
    """alpha/r by LoKrConfig, also where both factors are whole, as PEFT's own layer scales them."""
    header = {"transformer.r": 4, "transformer.alpha": 8, "transformer.decompose_factor": 4}
    whole = lokr(f"transformer.{Q}", lokr_w2_a=None, lokr_w2_b=None, lokr_w2=torch.ones(8, 8))
    for state, right in ((whole, True), (lokr(f"transformer.{Q}"), False)):
        save_file(state, tmp_path / "x", {"lora_adapter_metadata": json.dumps(header)})
        if right:
            torch.testing.assert_close(
                update_of(read_lora(tmp_path / "x", transformer).layers[Q], torch.device("cpu")),
                torch.full((32, 32), 2.0),
            )
        else:
            with pytest.raises(ValueError, match=f"says rank 4 for {Q}, its weights have rank 2"):
                read_lora(tmp_path / "x", transformer)


def test_layers_without_effect_are_named_and_a_file_may_hold_both_types(transformer: Any, tmp_path: Path) -> None:
    path, other = tmp_path / "x.safetensors", BLOCK + "attn.to_k"
    pair = {f"{other}.lora_A.weight": torch.ones(2, 32), f"{other}.lora_B.weight": torch.ones(32, 2)}
    save_file(lokr(alpha=torch.zeros(())) | pair, path)
    file = read_lora(path, transformer)
    assert file.notes == (f"{path}: the update of 1 of 2 layers is zero (first {Q})",)
    save_file(lokr() | pair, path)
    attached, file = small_transformer(), read_lora(path, transformer)
    attach_lora(attached, file)
    x = torch.randn(3, 32)
    for name, layer in file.layers.items():
        expected = transformer.get_submodule(name)(x) + x @ update_of(layer, x.device).t()
        torch.testing.assert_close(attached.get_submodule(name)(x), expected, atol=1e-4, rtol=1e-5)
    spec = LoraSpec(("to_q", "to_k"), 2, 2, type="lokr", factor=4)
    run = small_transformer()
    inject_lora(run, spec)
    with pytest.raises(ValueError, match=rf"has a LoRA on {other}, this run trains a LoKr"):
        start_from(run, file, spec)


# ── a trained one through every command ───────────────────────────────────────────────────────────────────────────────


def velocity(model: Any) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    latents = torch.randn(1, 12, 64, generator=generator)
    embeds = torch.randn(1, 9, model.config.joint_attention_dim, generator=generator)
    with torch.no_grad():
        return predict_velocity(model, latents, torch.tensor([0.6]), Prompt(embeds, None), 3, 4)


def base(model: Path, transformer_path: Path | None = None) -> Any:
    source = ModelSource(str(model), transformer_path=None if transformer_path is None else str(transformer_path))
    return load_transformer(resolve_model(source, ("transformer",)), torch.float32)


@pytest.fixture(scope="module")
def exact_model(small_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same in float32, so that merging rounds nothing."""
    copy = shutil.copytree(small_model, tmp_path_factory.mktemp("exact") / "model")
    for path in (copy / "transformer").glob("*.safetensors"):
        save_file({name: tensor.float() for name, tensor in load_file(path).items()}, path)
    return copy


@pytest.mark.parametrize("name", FORMATS)
def test_a_run_then_attached_merged_converted_and_started_from(
    exact_model: Path, small_data: Path, tmp_path: Path, capsys: Any, name: str
) -> None:
    """One velocity, by ComfyUI's formula for the file as it is written."""
    flags = ["--lora_type", "lokr", "--lokr_factor", "4", "--lora_alpha", "3", "--learning_rate", "0.05"]
    flags += ["--lora_target_modules", "to_q,img_mlp.net.2,proj_out"]
    run = tmp_path / "run"
    assert train(exact_model, small_data, run, *flags, "--lora_format", name, "--checkpoint_steps", "2") == 0
    said = capsys.readouterr()
    assert ("load_lora_adapter" in said.out + said.err) == (name == "diffusers")
    state = load_file(run / "lora.safetensors")
    expected = base(exact_model)
    before = velocity(expected)
    patches, unused = comfyui.load(state, linear_layers(expected))
    assert unused == [] and len(patches) == 3
    for layer, patch in patches.items():
        weight = expected.get_submodule(layer).weight
        weight.data = patch.applied(weight.data)
    right = velocity(expected)
    assert (right - before).abs().max() > 1e-2
    close = {"atol": 1e-5 * right.abs().max().item(), "rtol": 1e-5}

    attached = base(exact_model)
    attach_lora(attached, read_lora(run, attached))
    torch.testing.assert_close(velocity(attached), right, **close)
    merge_lora.merge(str(exact_model), [str(run)], tmp_path / "merged")
    torch.testing.assert_close(velocity(base(exact_model, tmp_path / "merged")), right, **close)
    for other in FORMATS:
        convert_lora.convert(run / "lora.safetensors", tmp_path / other, other, str(exact_model))
        again = base(exact_model)
        attach_lora(again, read_lora(tmp_path / other, again))
        torch.testing.assert_close(velocity(again), right, **close)
    (run / "lora.safetensors").unlink()  # a run that isn't done stands for its newest checkpoint
    stopped = base(exact_model)
    attach_lora(stopped, read_lora(run, stopped))
    torch.testing.assert_close(velocity(stopped), right, **close)
    more = ["--lora_checkpoint", str(tmp_path / "comfyui"), "--max_steps", "1", "--learning_rate", "1e-30"]
    assert train(exact_model, small_data, tmp_path / "on", *flags, *more) == 0
    on = base(exact_model)
    attach_lora(on, read_lora(tmp_path / "on", on))
    torch.testing.assert_close(velocity(on), right, **close)
    assert lora_parameters(attached) == {}
