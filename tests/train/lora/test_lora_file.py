"""Foreign LoRA files: the right update per layer in every spelling, and the right reason for what is refused."""

import json

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

from qwen_image.pipeline import QwenImagePipeline
from tests.helpers.lora_commands import COMMANDS, give_to
from tests.helpers.lora_styles import STYLES, write_style
from tests.helpers.small_transformer import small_transformer
from train.lora.inject import attach_lora, inject_lora, lora_parameters, start_from
from train.lora.lokr import update_of
from train.lora.lora_file import read_lora
from train.lora.preset_loras import Preset, merge_presets, merged
from train.lora.spec import LoraSpec
from train.lora.targets import base_layer

BLOCK = "transformer_blocks.0."
NAMES = (BLOCK + "attn.to_q", BLOCK + "img_mlp.net.0.proj", BLOCK + "txt_mlp.net.2", "proj_out", "img_in")
TARGETS = ("to_q", "img_mlp.net.0.proj", "txt_mlp.net.2", "proj_out", "img_in")
Q = BLOCK + "attn.to_q"


@pytest.fixture(scope="module")
def transformer():
    return small_transformer()


def shaped(transformer, ranks_and_alphas):
    layers = {}
    for name, (rank, alpha) in ranks_and_alphas.items():
        base = base_layer(transformer, name)
        layers[name] = (base.out_features, base.in_features, rank, alpha)
    return layers


ALPHAS = st.one_of(st.none(), st.sampled_from([0.5, 1, 3, 8, 16]))
LAYERS = st.dictionaries(st.sampled_from(NAMES), st.tuples(st.integers(1, 6), ALPHAS), min_size=1)


@settings(max_examples=30, deadline=None)
@given(style=st.sampled_from(sorted(STYLES)), header=st.booleans(), layers=LAYERS, seed=st.integers(0, 9))
def test_the_update_is_alpha_over_rank_in_every_spelling(transformer, tmp_path_factory, style, header, layers, seed):
    """Read, merged as a preset, started from and attached: each layer by its own rank and alpha."""
    path = tmp_path_factory.mktemp("style") / "lora.safetensors"
    updates = write_style(path, style, shaped(transformer, layers), seed, header)
    lora = read_lora(path, transformer)
    assert lora.layers.keys() == updates.keys()
    preset = Preset.read(f"{path}:0.5", transformer)
    fresh = small_transformer()
    spec = LoraSpec(TARGETS, 6, 3)
    inject_lora(fresh, spec)
    start_from(fresh, lora, spec)
    started = lora_parameters(fresh)
    attached = small_transformer()
    attach_lora(attached, lora)
    for name, update in updates.items():
        layer = lora.layers[name]
        torch.testing.assert_close(layer["lora_B"] @ layer["lora_A"], update, atol=1e-5, rtol=1e-5)
        weight = base_layer(transformer, name).weight
        torch.testing.assert_close(merged(weight, name, [preset]) - weight, update / 2, atol=1e-4, rtol=1e-4)
        a, b = started[f"{name}.lora_A"], started[f"{name}.lora_B"]
        torch.testing.assert_close(spec.scale * b @ a, update, atol=1e-4, rtol=1e-4)
        assert a.detach().flatten(1).norm(dim=1).min() > 0, "a row beyond the file's rank can't learn"
        module = attached.get_submodule(name)
        torch.testing.assert_close(module.get_delta_weight("default"), update, atol=1e-4, rtol=1e-4)


def test_patterns_of_the_header_are_regular_expressions_for_the_names_end(transformer, tmp_path):
    layers = shaped(transformer, {Q: (2, None), "proj_out": (4, None), BLOCK + "txt_mlp.net.2": (4, None)})
    plain = write_style(tmp_path / "a", "transformer.", layers)
    tensors = dict(read_tensors(tmp_path / "a"))
    adapter = {
        "transformer.r": 4,
        "transformer.lora_alpha": 8,
        "transformer.use_rslora": False,
        "transformer.rank_pattern": {"attn.to_q": 2},
        "transformer.alpha_pattern": {"transformer_blocks\\.0\\..*": 1, "to_q": 99},
    }
    save_file(tensors, tmp_path / "b", {"lora_adapter_metadata": json.dumps(adapter)})
    lora = read_lora(tmp_path / "b", transformer)
    for name, scale in {Q: 1 / 2, BLOCK + "txt_mlp.net.2": 1 / 4, "proj_out": 2.0}.items():
        update = lora.layers[name]["lora_B"] @ lora.layers[name]["lora_A"]
        torch.testing.assert_close(update, scale * plain[name], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("lokr", [False, True])
def test_the_header_of_a_transformers_own_save_lora_adapter_is_applied(tiny_model, tmp_path, lokr):
    """diffusers writes the config without a prefix there: alpha/r counts all the same, of a LoKr too."""
    from diffusers import QwenImageTransformer2DModel
    from peft import LoKrConfig, LoraConfig

    model = QwenImageTransformer2DModel.from_pretrained(tiny_model, subfolder="transformer")
    config = LoKrConfig(r=2, alpha=6, decompose_factor=4) if lokr else LoraConfig(r=2, lora_alpha=6)
    config.target_modules = {"to_q", "proj_out"}
    model.add_adapter(config)
    generator = torch.Generator().manual_seed(0)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data.normal_(0, 0.3, generator=generator)
    model.save_lora_adapter(tmp_path)
    (path,) = tmp_path.glob("*.safetensors")
    transformer = QwenImagePipeline.from_pretrained(str(tiny_model), components=("transformer",)).transformer
    layers = read_lora(path, transformer).layers
    assert len(layers) == 3
    for name, layer in layers.items():
        expected = model.get_submodule(name).get_delta_weight("default")
        torch.testing.assert_close(update_of(layer, expected.device), expected.detach(), atol=1e-5, rtol=1e-5)


def read_tensors(path):
    from safetensors.torch import load_file

    return load_file(path)


def pair(name=f"transformer.{Q}", rank=2, size=32, **changes):
    return {f"{name}.lora_A.weight": torch.ones(rank, size), f"{name}.lora_B.weight": torch.ones(size, rank)} | changes


T = f"transformer.{Q}"
NAN, INF = torch.full((2, 32), torch.nan), torch.full((32, 2), -torch.inf)
REFUSED = {
    "nothing": ({}, "holds no weights"),
    "only a text encoder": ({"text_encoder.a.lora_A.weight": torch.ones(2, 2)}, "only 1 weights of a text encoder"),
    "rank 0": (pair(rank=0), "rank 0"),
    "NaN": (pair() | {f"{T}.lora_A.weight": NAN}, f"lora_A of {Q} has values that are NaN or infinite"),
    "infinite": (pair() | {f"{T}.lora_B.weight": INF}, f"lora_B of {Q} has values that are NaN or infinite"),
    "infinite alpha": (pair() | {f"{T}.alpha": torch.tensor(torch.inf)}, f"alpha of {Q} has values"),
    "scale too large": (pair() | {f"{T}.alpha": torch.tensor(3e38), f"{T}.lora_B.weight": torch.full((32, 2), 1e9)},
                        "no longer finite"),
    "two spellings": (pair() | pair(f"diffusion_model.{Q}"), "two spellings of one weight"),
    "two alphas": (pair() | {f"{T}.alpha": torch.tensor(1.0), f"{Q}.alpha": torch.tensor(2.0)}, "two spellings"),
    "two adapters": (
        {f"{Q}.lora_{h}.{a}.weight": torch.ones(*s) for a in "ab" for h, s in (("A", (2, 32)), ("B", (32, 2)))},
        "two spellings",
    ),
    "integers": ({key: value.int() for key, value in pair().items()}, "holds I32 numbers"),
    "booleans": ({key: value.bool() for key, value in pair().items()}, "holds BOOL numbers"),
    "three alphas": (pair() | {f"{T}.alpha": torch.ones(3)}, r"has shape \[3\]; an alpha is one number"),
    "a complex alpha": (pair() | {f"{T}.alpha": torch.tensor(2 + 1j)}, "holds C64 numbers; an alpha is one real number"),
    "a boolean alpha": (pair() | {f"{T}.alpha": torch.tensor(True)}, "holds BOOL numbers; an alpha is one real number"),
    "no alpha": (pair() | {f"{T}.alpha": torch.ones(0)}, r"has shape \[0\]; an alpha is one number"),
    "one dimension": (pair() | {f"{T}.lora_A.weight": torch.ones(32)}, r"has shape \[32\]; .* matrices"),
    "a scalar": (pair() | {f"{T}.lora_A.weight": torch.tensor(1.0)}, r"has shape \[\]; .* matrices"),
    "four dimensions": (pair() | {f"{T}.lora_A.weight": torch.ones(2, 32, 1, 1)}, r"has shape \[2, 32, 1, 1\]"),
    "ranks differ": (pair() | {f"{T}.lora_B.weight": torch.ones(32, 3)}, "lora_A has rank 2, lora_B has rank 3"),
    "another width": (pair(size=48), "made for a 48×48 layer, but this model's is 32×32"),
    "half": ({f"{T}.lora_A.weight": torch.ones(2, 32)}, "incomplete"),
    "alpha alone": ({f"{T}.alpha": torch.ones(())}, "incomplete"),
    "half a LoKr": ({f"lycoris_{Q.replace('.', '_')}.lokr_w1": torch.ones(2, 2)}, "a LoKr without a whole lokr_w2"),
    "LoHa": ({f"diffusion_model.{Q}.hada_w1_a": torch.ones(2, 2)}, "a LoHa"),
    "OFT": ({f"lora_unet_{Q.replace('.', '_')}.oft_blocks": torch.ones(2, 2)}, "an OFT"),
    "a difference": ({f"diffusion_model.{Q}.diff": torch.ones(32, 32)}, "a whole weight's difference"),
    "a bias's difference": (pair() | {f"diffusion_model.{Q}.diff_b": torch.ones(32)}, "a whole weight's difference"),
    "dora_scale": (pair() | {f"{T}.dora_scale": torch.ones(32, 1)}, "a DoRA whose formula the file doesn't tell"),
    "a bias": (pair() | {f"{T}.lora_B.bias": torch.ones(32)}, "a LoRA with a bias"),
    "an adapter's bias": (pair() | {f"{T}.lora_B.default.bias": torch.ones(32)}, "a LoRA with a bias"),
    "PEFT's file": (pair(f"base_model.model.{Q}"), r"adapter_config\.json"),
    "Tucker": (pair() | {f"{T}.lora_mid.weight": torch.ones(2, 2, 1, 1)}, "a third matrix"),
    "a whole model": ({f"{Q}.weight": torch.ones(32, 32)}, "a weight of a whole model"),
    "a VAE": ({"decoder.conv_in.bias": torch.ones(3)}, "a weight of a whole model"),
    "scaled float8": (pair() | {f"{T}.lora_A.scale_weight": torch.ones(())}, "scaled float8"),
    "another model": (pair("transformer.single_blocks.0.to_q"), "belongs to another model"),
    "a block too many": (pair("transformer.transformer_blocks.60.attn.to_q"), "belongs to another model"),
    "a norm": (pair(f"transformer.{BLOCK}attn.norm_q"), "no LoRA weight of a layer"),
    "magnitudes too few": (pair() | {f"{T}.lora_magnitude_vector": torch.ones(3)}, "each with one magnitude"),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_refused_for_its_own_reason_and_in_one_line(transformer, tmp_path, case):
    tensors, message = REFUSED[case]
    path = tmp_path / "foreign.safetensors"
    save_file({key: value.contiguous() for key, value in tensors.items()}, path)
    with pytest.raises(ValueError, match=message) as error:
        read_lora(path, transformer)
    assert str(path) in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize(
    "header,message",
    [
        ("[1, 2]", "it is a list, not an object"),
        ("{", "is damaged"),
        ("[" * 100_000, "is damaged"),
        ('{"transformer.r": "four", "transformer.lora_alpha": 4}', "r is 'four', not a finite number"),
        ('{"transformer.r": 2, "transformer.lora_alpha": NaN}', "lora_alpha is nan"),
        ('{"transformer.r": 2, "transformer.lora_alpha": null}', "lora_alpha is None"),
        ('{"transformer.r": true}', "r is True"),
        ('{"transformer.r": 2, "transformer.alpha_pattern": [3]}', r"alpha_pattern is '?\[3\]"),
        ('{"transformer.r": 2, "transformer.alpha_pattern": {"to_(q": 3}}', "is damaged"),
        ('{"transformer.r": 2, "transformer.rank_pattern": {"to_q": "x"}}', "rank_pattern of to_q is 'x'"),
        ('{"transformer.r": 2, "transformer.use_rslora": "false"}', "use_rslora is 'false', not true or false"),
        ('{"transformer.r": 2, "transformer.use_dora": [1]}', r"use_dora is '?\[1\]'?, not true or false"),
        ('{"transformer.r": 2, "transformer.use_dora": true}', f"says use_dora, but there are no magnitudes of {Q}"),
        ('{"transformer.r": 16, "transformer.lora_alpha": 16}', f"says rank 16 for {Q}, its weights have rank 2"),
    ],
)
def test_a_damaged_header_is_named(transformer, tmp_path, header, message):
    path = tmp_path / "odd.safetensors"
    save_file(pair(), path, {"lora_adapter_metadata": header})
    with pytest.raises(ValueError, match=message) as error:
        read_lora(path, transformer)
    assert str(path) in str(error.value) and "\n" not in str(error.value)


def test_an_alpha_and_a_header_that_disagree_are_refused(transformer, tmp_path):
    path, header = tmp_path / "x.safetensors", {"transformer.r": 2, "transformer.lora_alpha": 4}
    for alpha, right in ((4.0, True), (8.0, False)):
        save_file(pair() | {f"{T}.alpha": torch.tensor(alpha)}, path, {"lora_adapter_metadata": json.dumps(header)})
        if right:
            torch.testing.assert_close(read_lora(path, transformer).layers[Q]["lora_B"], torch.full((32, 2), 2.0))
        else:
            with pytest.raises(ValueError, match=rf"x\.safetensors: the alpha of {Q} makes its scale 4, the header 2"):
                read_lora(path, transformer)


@pytest.mark.parametrize("alpha", [torch.tensor(4), torch.full((1,), 4.0), torch.full((1, 1, 1, 1), 4.0).half()])
def test_an_alpha_is_one_number_of_any_shape(transformer, tmp_path, alpha):
    save_file(pair() | {f"{T}.alpha": alpha}, tmp_path / "x")
    torch.testing.assert_close(read_lora(tmp_path / "x", transformer).layers[Q]["lora_B"], torch.full((32, 2), 2.0))


def test_layers_without_effect_are_named(transformer, tmp_path):
    path = tmp_path / "x.safetensors"
    save_file(pair() | {f"{T}.alpha": torch.zeros(())}, path)
    assert read_lora(path, transformer).notes == (f"{path}: the update of 1 of 1 layers is zero (first {Q})",)
    save_file(pair() | {f"{T}.lora_A.weight": torch.zeros(2, 32)}, path)
    assert "1 of 1 layers is zero" in read_lora(path, transformer).notes[0]
    save_file(pair(), path)
    assert read_lora(path, transformer).notes == ()


def test_keys_are_shown_on_one_line_of_bounded_length(transformer, tmp_path):
    path = tmp_path / "x.safetensors"
    for key in ("a\nb\x1b[31m.lora_A.weight", "k" * 100_000):
        save_file({key: torch.ones(1)}, path)
        with pytest.raises(ValueError) as error:
            read_lora(path, transformer)
        assert len(str(error.value)) < 1000 and not set("\n\x1b") & set(str(error.value))


@pytest.mark.parametrize("prefix", ["text_encoder.model.layers.0.q_proj", "lora_te_model_layers_0_q", "lora_te1_q"])
def test_text_encoder_parts_are_left_out_and_named(transformer, tmp_path, prefix):
    path = tmp_path / "both.safetensors"
    save_file(pair() | pair(prefix, size=8), path)
    lora = read_lora(path, transformer)
    assert set(lora.layers) == {Q}
    assert len(lora.notes) == 1 and "2 weights of a text encoder are left out" in lora.notes[0]
    assert prefix in lora.notes[0]


def test_a_higher_rank_than_the_runs_is_refused(transformer, tmp_path):
    path = tmp_path / "lora.safetensors"
    write_style(path, "none", shaped(transformer, {Q: (5, None)}))
    fresh = small_transformer()
    spec = LoraSpec(TARGETS, 4, 4)
    inject_lora(fresh, spec)
    with pytest.raises(ValueError, match=f"rank 5 on {Q}, this run has lora_rank 4"):
        start_from(fresh, read_lora(path, fresh), spec)


def test_a_dora_with_plain_layers_beside_it_is_applied_layer_by_layer(transformer, tmp_path):
    """Merged, attached, and started from in a DoRA run: the plain layer is not normalized."""
    magnitudes = base_layer(transformer, Q).weight.norm(dim=1) * 1.2
    path = tmp_path / "mixed.safetensors"
    save_file(
        pair(rank=1) | pair(f"transformer.{BLOCK}attn.to_k", rank=1) | {f"{T}.lora_magnitude_vector": magnitudes}, path
    )
    lora = read_lora(path, transformer)
    reference, attached, started = small_transformer(), small_transformer(), small_transformer()
    merge_presets(reference, [Preset.read(str(path), reference)])
    plain = reference.get_submodule(BLOCK + "attn.to_k").weight - transformer.get_submodule(BLOCK + "attn.to_k").weight
    torch.testing.assert_close(plain, torch.ones(32, 32))
    attach_lora(attached, lora)
    spec = LoraSpec(("to_q", "to_k"), 2, 2, dora=True)
    inject_lora(started, spec)
    assert start_from(started, lora, spec) == 2
    x = torch.randn(3, 32, generator=torch.Generator().manual_seed(0))
    for name in (Q, BLOCK + "attn.to_k"):
        expected = reference.get_submodule(name)(x)
        torch.testing.assert_close(attached.get_submodule(name)(x), expected, atol=2e-4, rtol=2e-5)
        torch.testing.assert_close(started.get_submodule(name)(x), expected, atol=2e-4, rtol=2e-5)


@pytest.mark.parametrize("case", ["nothing", "rank 0", "NaN", "integers", "LoHa"])
@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_refuses_it_with_one_line_and_writes_nothing(
    small_model, small_data, tmp_path, capsys, command, case
):
    path, output = tmp_path / "foreign.safetensors", tmp_path / "out"
    save_file({key: value.contiguous() for key, value in REFUSED[case][0].items()}, path)
    code = give_to(command, path, small_model, small_data, output)
    (error,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert code == 2 and str(path) in error
    assert not output.exists() or not any(output.iterdir())
