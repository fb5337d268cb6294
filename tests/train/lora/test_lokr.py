"""LoKr: PEFT's shapes and numbers, factor by factor; starting values and files, strength, and what doesn't go with it."""

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import LoKrConfig
from peft.tuners.lokr import layer as peft_lokr
from torch import nn

from qwen_image.float8.linear import quantize_blocks
from tests.helpers.small_transformer import small_transformer
from train.config.train_config import TrainConfig
from train.fit.memory_plan import layer_parameters
from train.loader.batch_shapes import BatchShape, random_arguments
from train.lora.inject import attach_lora, detach_lora, inject_lora, lora_parameters, set_lora_strength, start_from
from train.lora.lokr import is_lokr, kronecker_linear, rank_lines, shapes, update_of
from train.lora.lokr_layer import LoKrLinear
from train.lora.lora_file import LoraFile, read_lora, save_lora
from train.lora.preset_loras import Preset, as_one
from train.lora.spec import LoraSpec
from train.lora.strength import lora_at
from train.step.build import StepOptions, build_step
from train.step.fused_projection import can_fuse

CPU = torch.device("cpu")
TARGETS = ("to_q", "add_k_proj", "img_mlp.net.2", "txt_mlp.net.0.proj", "proj_out")
SHAPE = BatchShape(2, 64, 96, 12, True)
SIDES = st.sampled_from([1, 5, 12, 16, 24, 30, 32, 64, 96])
FACTORS = st.sampled_from([-1, 1, 2, 3, 4, 7, 8, 16, 50])


def lokr(rank: int = 3, alpha: float = 6.0, **more: Any) -> LoraSpec:
    return LoraSpec(TARGETS, rank, alpha, type="lokr", **more)


def drawn(outputs: int, inputs: int, spec: LoraSpec, dtype: torch.dtype = torch.float64) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    sizes = shapes(outputs, inputs, spec.rank, spec.factor, spec.decompose_both)
    return {kind: torch.randn(size, generator=generator, dtype=dtype) for kind, size in sizes.items()}


def pefts(outputs: int, inputs: int, spec: LoraSpec) -> peft_lokr.Linear:
    config = LoKrConfig(decompose_factor=spec.factor, decompose_both=spec.decompose_both)
    base = nn.Linear(inputs, outputs, dtype=torch.float64)
    return peft_lokr.Linear(base, "default", config, r=spec.rank, alpha=spec.alpha)


@settings(max_examples=60, deadline=None)
@given(outputs=SIDES, inputs=SIDES, rank=st.integers(1, 20), factor=FACTORS, both=st.booleans())
def test_shapes_outputs_and_gradients_are_pefts(outputs: int, inputs: int, rank: int, factor: int, both: bool) -> None:
    """In float64 against PEFT's layer, which puts the product together; the memory plan counts what is trained."""
    spec = lokr(rank, 5.0, factor=factor, decompose_both=both)
    theirs = pefts(outputs, inputs, spec)
    weights = {kind: tensor.requires_grad_() for kind, tensor in drawn(outputs, inputs, spec).items()}
    own = {name.split(".")[0]: p for name, p in theirs.named_parameters() if "lokr" in name}
    assert {kind: p.shape for kind, p in own.items()} == {kind: tensor.shape for kind, tensor in weights.items()}
    assert layer_parameters(spec, theirs.base_layer) == sum(p.numel() for p in own.values())
    for kind, parameter in own.items():
        parameter.data.copy_(weights[kind])
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(2, 3, inputs, generator=generator, dtype=torch.float64, requires_grad=True)
    upstream = torch.randn(2, 3, outputs, generator=generator, dtype=torch.float64)
    expected = theirs._get_delta_activations("default", x)
    found = kronecker_linear(x, weights, spec.scale)
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-10)
    ours = torch.autograd.grad(found, [x, *weights.values()], upstream)
    others = torch.autograd.grad(expected, [x, *(own[kind] for kind in weights)], upstream)
    for one, other in zip(ours, others, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-10, atol=1e-10)
    update = update_of({kind: tensor.detach() for kind, tensor in weights.items()}, CPU)
    torch.testing.assert_close(spec.scale * update, theirs.get_delta_weight("default").detach())


@pytest.mark.parametrize("spec", [lokr(3), lokr(99), lokr(2, factor=2, decompose_both=True)], ids=str)
def test_the_layer_keeps_no_more_activations_than_its_input(spec: LoraSpec) -> None:
    weights = {kind: tensor.float().requires_grad_() for kind, tensor in drawn(96, 64, spec).items()}
    x, kept = torch.randn(50, 64, requires_grad=True), set()
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.add(t.untyped_storage().data_ptr()) or t, lambda t: t):
        kronecker_linear(x, weights, 1.0)
    small = {tensor.untyped_storage().data_ptr() for tensor in weights.values()}
    assert len(kept - small - {x.untyped_storage().data_ptr()}) <= 1  # w1 of two factors, a x c


def outputs(transformer: Any) -> torch.Tensor:
    generator = torch.Generator().manual_seed(3)
    latents = torch.randn(1, 6, 64, generator=generator)
    prompt = torch.randn(1, 5, 24, generator=generator)
    with torch.no_grad():
        return transformer(latents, torch.tensor([0.5]), prompt, None, ((2, 3),))


def trained(spec: LoraSpec, seed: int = 1) -> Any:
    transformer = small_transformer()
    inject_lora(transformer, spec)
    generator = torch.Generator().manual_seed(seed)
    for parameter in lora_parameters(transformer).values():
        parameter.data.normal_(0, 0.3, generator=generator)
    return transformer


@pytest.mark.parametrize("spec", [lokr(2), lokr(50), lokr(2, factor=4, decompose_both=True)], ids=str)
def test_a_fresh_lokr_changes_nothing_and_is_drawn_by_seed_and_layer(spec: LoraSpec) -> None:
    transformer = small_transformer()
    before = outputs(transformer)
    modules = inject_lora(transformer, spec, seed=7)
    assert torch.equal(outputs(transformer), before)
    parameters = lora_parameters(transformer)
    assert {name.rpartition(".")[0] for name in parameters} == set(modules)
    assert sum(p.numel() for p in parameters.values()) == sum(
        layer_parameters(spec, small_transformer().get_submodule(name)) for name in modules
    )
    for name, parameter in parameters.items():
        zero = name.endswith((".lokr_w2", ".lokr_w2_b"))
        assert bool(parameter.any()) != zero, name
        if not zero:
            assert parameter.abs().max() <= parameter.shape[1] ** -0.5
    few, other = small_transformer(), small_transformer()
    inject_lora(few, LoraSpec(("to_q",), spec.rank, spec.alpha, type="lokr", factor=spec.factor,
                              decompose_both=spec.decompose_both), seed=7)  # fmt: skip
    inject_lora(other, spec, seed=8)
    for name, parameter in lora_parameters(few).items():
        assert torch.equal(parameter, parameters[name])
    first = next(name for name in parameters if ".lokr_w1" in name)
    assert not torch.equal(lora_parameters(other)[first], parameters[first])


def test_the_model_computes_what_it_computes_with_pefts_own_forward(monkeypatch: pytest.MonkeyPatch) -> None:
    transformer = trained(lokr())
    ours = outputs(transformer)
    monkeypatch.delattr(LoKrLinear, "forward")
    transformer.eval()
    torch.testing.assert_close(ours, outputs(transformer), atol=1e-5, rtol=1e-5)
    assert (ours - outputs(small_transformer())).abs().max() > 0.1


def step_gradients(transformer: Any, spec: LoraSpec, **options: Any) -> list[torch.Tensor]:
    types = {"dtype": torch.float32, "lora_dtype": torch.float32}
    built = build_step(transformer, spec, StepOptions(device=CPU, **types, **options))
    generator = torch.Generator().manual_seed(1)
    for parameter in built.module.matrices():
        parameter.data.normal_(0, 0.2, generator=generator)
    loss = built.module(*random_arguments(SHAPE, 24, CPU)).mean()
    return [loss.detach(), *torch.autograd.grad(loss, built.module.matrices())]


def test_no_projection_is_fused_and_recomputing_changes_nothing() -> None:
    assert not can_fuse(lokr(), torch.float32, torch.float32)
    plain = step_gradients(small_transformer(), lokr())
    again = step_gradients(small_transformer(), lokr(), checkpointed_blocks=2)
    for one, other in zip(plain, again, strict=True):
        torch.testing.assert_close(one, other, rtol=2e-5, atol=1e-6)


def test_on_a_float8_base_and_with_bfloat16_weights() -> None:
    """The update is that of the exact input, added to the float8 product."""
    transformer = small_transformer().bfloat16()
    quantize_blocks(transformer)
    base = copy.deepcopy(transformer.get_submodule("transformer_blocks.0.attn.to_q"))
    inject_lora(transformer, lokr(), dtype=torch.bfloat16)
    layer = transformer.get_submodule("transformer_blocks.0.attn.to_q")
    weights = {kind: tensor.data.normal_(0, 0.3) for kind, tensor in layer.weights().items()}
    assert {tensor.dtype for tensor in weights.values()} == {torch.bfloat16}
    x = torch.randn(4, 32, dtype=torch.bfloat16)
    update = 2 * update_of({kind: tensor.double() for kind, tensor in weights.items()}, CPU)
    expected = base(x).double() + x.double() @ update.t()
    assert layer(x).dtype == torch.bfloat16
    torch.testing.assert_close(layer(x).double(), expected, atol=0.05, rtol=0.02)


def test_a_layer_compiles_as_one_graph() -> None:
    """PEFT's own forward draws a number for its module dropout, and breaks the graph there."""
    layer = trained(lokr()).get_submodule("transformer_blocks.0.attn.to_q")
    x = torch.randn(4, 32, requires_grad=True)
    compiled = torch.compile(layer, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(x), layer(x))
    parameters = [x, *layer.weights().values()]
    for one, other in zip(
        torch.autograd.grad(compiled(x).square().sum(), parameters),
        torch.autograd.grad(layer(x).square().sum(), parameters),
        strict=True,
    ):
        torch.testing.assert_close(one, other)
    torch._dynamo.reset()


# ── files and strength ────────────────────────────────────────────────────────────────────────────────────────────────


def saved(transformer: Any, spec: LoraSpec, path: Path) -> LoraFile:
    save_lora(path, lora_parameters(transformer), spec, {}, torch.float32)
    return read_lora(path, small_transformer())


@pytest.mark.parametrize("spec", [lokr(2), lokr(50), lokr(2, factor=4, decompose_both=True)], ids=str)
def test_the_file_attached_is_the_trained_model_at_every_strength(tmp_path: Path, spec: LoraSpec) -> None:
    transformer = trained(spec)
    file = saved(transformer, spec, tmp_path / "lokr.safetensors")
    assert file.metadata["lora_type"] == "lokr" and all(map(is_lokr, file.layers.values()))
    attached = small_transformer()
    base = outputs(attached)
    attach_lora(attached, file)
    torch.testing.assert_close(outputs(attached), outputs(transformer), atol=1e-5, rtol=1e-5)
    before = {name: p.detach().clone() for name, p in lora_parameters(transformer).items()}
    for strength in (0.0, 0.5, -1.0, 1.0):
        set_lora_strength(attached, strength)
        with lora_at(transformer, strength):
            torch.testing.assert_close(outputs(attached), outputs(transformer), atol=1e-5, rtol=1e-5)
        if strength == 0:
            assert torch.equal(outputs(attached), base)
    assert all(torch.equal(p, before[name]) for name, p in lora_parameters(transformer).items())
    detach_lora(attached)
    assert torch.equal(outputs(attached), base) and not any(isinstance(m, LoKrLinear) for m in attached.modules())


@pytest.mark.parametrize(
    "first,then",
    [
        (lokr(2), lokr(2)),
        (lokr(2, 4.0), lokr(3, 12.0)),
        (lokr(2), lokr(50, 25.0)),
        (lokr(1, factor=8, decompose_both=True), lokr(2, 6.0, factor=8, decompose_both=True)),
        (lokr(1, factor=8, decompose_both=True), lokr(60, factor=8)),
        (lokr(60, 30.0, factor=4), lokr(60, factor=4)),
    ],
    ids=str,
)
def test_a_run_starts_with_what_the_file_says(tmp_path: Path, first: LoraSpec, then: LoraSpec) -> None:
    transformer = trained(first)
    file = saved(transformer, first, tmp_path / "lokr.safetensors")
    fresh = small_transformer()
    inject_lora(fresh, then)
    assert start_from(fresh, file, then) == len(file.layers)
    torch.testing.assert_close(outputs(fresh), outputs(transformer), atol=1e-5, rtol=1e-5)
    for name, parameter in lora_parameters(
        fresh
    ).items():  # what is left of a rank can learn: one half of it is not zero
        if name.endswith(("_w1_a", "_w2_a")):
            assert parameter.norm(dim=0).min() > 0


PLAIN = LoraSpec(TARGETS, 3, 3)


@pytest.mark.parametrize(
    "first,then,message",
    [
        (lokr(2), PLAIN, "has a LoKr on .*, this run trains a LoRA: say --lora_type lokr"),
        (PLAIN, lokr(2), "has a LoRA on .*, this run trains a LoKr: say --lora_type lora, or merge"),
        (lokr(2, factor=2), lokr(2, factor=4), r"w1 is 2×2 on .*, with lokr_factor 4 this run's is 4×4"),
        (lokr(50), lokr(2), r"a whole lokr_w2 on .* product of rank 2: say lora_rank 4"),
        (lokr(3), lokr(2), "has rank 3 on .*, this run has lora_rank 2: say at least 3"),
        (
            lokr(1, factor=8),
            lokr(1, factor=8, decompose_both=True),
            "a whole lokr_w1 on .*: say lokr_decompose_both false",
        ),
    ],
)
def test_a_start_that_does_not_fit_is_refused_by_name(
    tmp_path: Path, first: LoraSpec, then: LoraSpec, message: str
) -> None:
    file = saved(trained(first), first, tmp_path / "file.safetensors")
    fresh = small_transformer()
    inject_lora(fresh, then)
    with pytest.raises(ValueError, match=message):
        start_from(fresh, file, then)


def test_lokr_and_lora_add_up_but_not_on_one_layer(tmp_path: Path) -> None:
    """On layers of their own both are attached, each times its weight; the file of both is merged as they are."""
    one, two = LoraSpec(("to_q",), 3, 6.0, type="lokr"), LoraSpec(("to_k", "proj_out"), 2, 3.0)
    for name, spec in (("one", one), ("two", two)):
        save_lora(tmp_path / name, lora_parameters(trained(spec)), spec, {}, torch.float32)
    presets = [
        Preset.read(f"{tmp_path / name}:{weight}", small_transformer()) for name, weight in (("one", 0.5), ("two", 2))
    ]
    expected, found = small_transformer(), small_transformer()
    for preset in presets:
        for name, layer in preset.lora.layers.items():
            expected.get_submodule(name).weight.data += preset.weight * update_of(layer, CPU)
    attach_lora(found, as_one(presets))
    torch.testing.assert_close(outputs(found), outputs(expected), atol=1e-5, rtol=1e-5)
    with pytest.raises(ValueError, match=r"one is a LoKr and can't be added to another on transformer_blocks\.0"):
        as_one([presets[0], presets[0]])


# ── what goes with it ─────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    "more,message",
    [
        ({"lora_dora": True}, "lora_type lokr has no lora_dora"),
        ({"lora_rslora": True}, "lora_type lokr has no lora_rslora"),
        ({"lora_dropout": 0.1}, "lora_type lokr has no lora_dropout"),
        ({"lora_format": "diffsynth"}, "lora_format diffsynth has no name for a LoKr"),
        ({"lokr_factor": 0}, "lokr_factor must be -1 or at least 1, got 0"),
        ({"lokr_factor": -2}, "lokr_factor must be at least -1"),
        ({"lora_type": "loha"}, "lora_type"),
        ({"lora_type": "lora", "lokr_factor": 8}, "are a LoKr's: say lora_type lokr"),
        ({"lora_type": "lora", "lokr_decompose_both": True}, "are a LoKr's: say lora_type lokr"),
    ],
)
def test_what_does_not_go_together_is_refused(more: dict[str, Any], message: str) -> None:
    options: dict[str, Any] = {
        "model": "m",
        "data": "d",
        "deepspeed": "z.json",
        "output_path": "o",
        "lora_type": "lokr",
    }
    with pytest.raises(ValueError, match=message):
        TrainConfig(**options | more)


def test_a_loras_identity_is_as_it_was_and_a_lokrs_tells_its_factors() -> None:
    """Checkpoints of earlier versions go on; one of a LoKr has other weights."""
    assert LoraSpec(("to_q",), 4, 4.0).identity() == {
        "lora": {"target_modules": ["to_q"], "rank": 4, "alpha": 4.0, "dropout": 0.0, "rslora": False, "dora": False}
    }
    own = lokr(factor=8).identity()["lora"]
    assert (own["type"], own["factor"], own["decompose_both"], own["rank"]) == ("lokr", 8, False, 3)
    assert "LoKr of rank 3, factor 8, scale 2" in lokr(factor=8).line(5, 6)


def test_where_the_rank_has_no_effect_is_told() -> None:
    """Of Qwen-Image's sizes: w2 of 3072 x 3072 is 64 x 64 by default, whole from rank 32 on."""
    layers = [nn.Linear(3072, 3072, device="meta"), nn.Linear(3072, 12288, device="meta")]
    (line,) = rank_lines(layers, LoraSpec(("to_q",), 32, 32.0, type="lokr"))
    assert line.startswith("lora_rank 32 is at least half of w2's longer side (64 at most) on 1 of 2 layers")
    assert rank_lines(layers, LoraSpec(("to_q",), 31, 32.0, type="lokr")) == []
    assert rank_lines(layers, LoraSpec(("to_q",), 32, 32.0)) == []
