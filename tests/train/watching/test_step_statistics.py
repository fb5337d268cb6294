"""What rows tell besides the loss: σ, losses by σ, tokens, arithmetic, norms of the LoRA, where the time went."""

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from qwen_image.model.conditioning import Prompt
from qwen_image.model.sizes import TransformerConfig
from tests.helpers.forked_ranks import import_once, run_ranks  # noqa: F401 (a fixture)
from tests.helpers.small_transformer import small_transformer
from tests.helpers.training_run import train
from train.fit import step_flops
from train.lora.inject import inject_lora, lora_parameters
from train.lora.lokr import update_of
from train.lora.spec import LoraSpec
from train.watching.late_row import LateRow
from train.watching.lora_norms import LoraNorms
from train.watching.step_clock import TimeSplit, seconds_of
from train.watching.step_statistics import FLOPS, TOKENS, StepStatistics

CPU = torch.device("cpu")


def row(statistics: StepStatistics, *more: int) -> dict[str, float]:
    return LateRow.of(1, [statistics.row(*more)], loss=0.5).read()


def of_a_rank(world: int) -> dict[str, float]:
    import torch.distributed as dist

    statistics = StepStatistics(TransformerConfig(num_layers=2), CPU, has_prior=True)
    for turn in range(2 // world * 2):  # four micro-batches in all
        place = turn * world + dist.get_rank()
        sigma = torch.tensor([0.1 + 0.2 * place, 0.15 + 0.2 * place])
        losses = torch.tensor([1.0 + place, float("nan") if place == 3 else 3.0 + place])
        prompt = Prompt(torch.zeros(2, 5 + place, 8), None)
        batch = SimpleNamespace(sigma=sigma, prior=torch.ones(2, dtype=torch.bool) if place in (1, 3) else None)
        statistics.saw(batch, losses, torch.zeros(2, 16, 1, 4, 8), prompt)  # type: ignore[arg-type]
    found = row(statistics, 7, 1)
    assert statistics.row  # and begins anew
    return found


@pytest.mark.parametrize("world", [1, 2])
def test_of_all_ranks_together(world: int) -> None:
    found = run_ranks(world, of_a_rank, world)
    sigmas = np.array([start + 0.2 * place for place in range(4) for start in (0.1, 0.15)])
    assert found["sigma_mean"] == pytest.approx(sigmas.mean()) and found["sigma_std"] == pytest.approx(sigmas.std())
    assert found["sigma_min"] == pytest.approx(0.1) and found["sigma_max"] == pytest.approx(0.75)
    assert [found.get(f"loss/sigma_{s}") for s in (0.1, 0.3, 0.5, 0.7, 0.9)] == [2.0, 3.0, 4.0, 4.0, None]
    assert found["loss/prior"] == pytest.approx((2 + 4 + 4) / 3) and found["loss/subject"] == pytest.approx(3)
    assert found[TOKENS] == sum(2 * (8 + 5 + place) for place in range(4))
    assert found["skipped_steps"] == 7 and found["skipped_samples"] == world and found["loss"] == 0.5
    each = sum(step_flops.step_flops(TransformerConfig(num_layers=2), 2, 8, 5 + place) for place in range(4))
    assert found[FLOPS] == pytest.approx(each / world)


def of_a_subject() -> list[float | None]:
    found: list[float | None] = []
    for has_prior in (True, False):
        statistics = StepStatistics(TransformerConfig(num_layers=2), CPU, has_prior)
        batch, prompt = SimpleNamespace(sigma=torch.tensor([0.5]), prior=None), Prompt(torch.zeros(1, 5, 8), None)
        statistics.saw(batch, torch.tensor([3.0]), torch.zeros(1, 16, 1, 4, 8), prompt)  # type: ignore[arg-type]
        found.append(row(statistics, 0, 0).get("loss/subject"))
    return found


def test_the_subject_is_told_from_the_first_row_on() -> None:
    """Also in rows before the first sample of the prior, and in those that follow a resume."""
    assert run_ranks(1, of_a_subject) == [3.0, None]


def test_arithmetic_is_that_of_the_full_model() -> None:
    """shared design's number: 154 TFLOP a step of 4,096 image and 128 text tokens; the linear layers' share by the weights."""
    flops = step_flops.step_flops(TransformerConfig(), 1, 4096, 128)
    assert flops == pytest.approx(154e12, rel=0.005)
    config = small_transformer().config
    weights = sum(
        module.weight.numel()
        for name, module in small_transformer().named_modules()
        if isinstance(module, torch.nn.Linear) and "transformer_blocks." in name and "_mod." not in name
    )
    linear = 2 * 2 * weights / 2 * 10  # half of them for each stream
    attention = 3 * 4 * config.num_layers * 10**2 * config.inner_dim
    assert step_flops.step_flops(config, 1, 6, 4) == pytest.approx(linear + attention)
    assert step_flops.peak_flops(CPU) is None


def test_norms_are_those_of_the_products() -> None:
    transformer = small_transformer()
    inject_lora(transformer, LoraSpec(("attention", "img_mlp.net.2", "proj_out"), 3, 6.0), 0, torch.float32)
    parameters = lora_parameters(transformer)
    generator = torch.Generator().manual_seed(0)
    for parameter in parameters.values():
        parameter.data.normal_(generator=generator)
    found = LateRow.of(1, [norms] if (norms := LoraNorms(transformer, 2.0).row()) else []).read()
    kinds = ("attention_image", "attention_text", "mlp_image", "other")
    assert set(found) == {f"{name}_norm/{kind}" for name in ("weight", "update") for kind in kinds}
    image = [name for name in parameters if ".to_" in name and ".to_add_out" not in name]
    weights = torch.stack([parameters[name].norm() for name in image]).norm()
    layers = {name.rpartition(".")[0] for name in image}
    products = [2 * parameters[f"{layer}.lora_B"] @ parameters[f"{layer}.lora_A"] for layer in sorted(layers)]
    assert found["weight_norm/attention_image"] == pytest.approx(weights.item(), rel=1e-5)
    update = torch.stack([product.norm() for product in products]).norm().item()
    assert found["update_norm/attention_image"] == pytest.approx(update, rel=1e-5)
    assert found["update_norm/other"] == pytest.approx(
        2 * (parameters["proj_out.lora_B"] @ parameters["proj_out.lora_A"]).norm().item(), rel=1e-5
    )


@pytest.mark.parametrize("rank,both", [(2, True), (2, False), (50, False)])
def test_norms_of_a_lokr_are_those_of_its_updates(rank: int, both: bool) -> None:
    transformer = small_transformer()
    spec = LoraSpec(("attention", "proj_out"), rank, 6.0, type="lokr", factor=8, decompose_both=both)
    inject_lora(transformer, spec, 0, torch.float32)
    generator = torch.Generator().manual_seed(0)
    layers: dict[str, dict[str, torch.Tensor]] = {}
    for name, parameter in lora_parameters(transformer).items():
        parameter.data.normal_(generator=generator)
        layer, _, kind = name.rpartition(".")
        layers.setdefault(layer, {})[kind] = parameter.detach()
    found = LateRow.of(1, [norms] if (norms := LoraNorms(transformer, 2.0).row()) else []).read()
    updates = {name: 2 * update_of(weights, CPU) for name, weights in layers.items()}
    image = [update for name, update in updates.items() if ".to_" in name and ".to_add_out" not in name]
    assert found["update_norm/other"] == pytest.approx(updates["proj_out"].norm().item(), rel=1e-5)
    expected = torch.stack([update.norm() for update in image]).norm().item()
    assert found["update_norm/attention_image"] == pytest.approx(expected, rel=1e-5)
    weights = torch.stack([weight.norm() for weight in layers["proj_out"].values()]).norm().item()
    assert found["weight_norm/other"] == pytest.approx(weights, rel=1e-5)


def test_norms_that_find_no_memory_are_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    transformer = small_transformer()
    inject_lora(transformer, LoraSpec(("to_q",), 2, 2.0), 0, torch.float32)
    norms = LoraNorms(transformer, 1.0)

    def full(*arguments: Any) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr("train.watching.lora_norms.update_square", full)
    assert norms.row() is None and "no memory" in norms.off and norms.row() is None


class Clock:
    """Each mark is a second after the last one."""

    def __init__(self) -> None:
        self.now = 0.0

    def mark(self) -> object:
        self.now += 1.0
        return self.now

    def seconds(self, earlier: Any, later: Any) -> float:
        return later - earlier


def test_the_split_of_a_step() -> None:
    clock = Clock()
    split = TimeSplit(clock, row_steps=40)
    for _ in range(40):
        split.begin()
        for part in ("data", "forward", "backward", "optimizer") * 2:  # two micro-batches
            split.reached(part)
    taken = split.take()
    assert len(taken) == 10 and clock.now == 10 * 9 and split.take() == []
    found = seconds_of(clock, taken, 9.5)
    assert found == {f"seconds/{part}": 2.0 for part in ("data", "forward", "backward", "optimizer")} | {
        "seconds/other": 1.5
    }
    off = TimeSplit(None)
    off.begin()
    off.reached("data")
    assert off.take() == [] and seconds_of(clock, [], 1.0) == {}


def one_run(model: Path, data: Path, output: Path) -> int:
    more = ["--activation_checkpointing", "full", "--cuda_graphs", "off", "--save_steps", "0", "--log_steps", "2"]
    return train(model, data, output, *more, "--lora_target_modules", "attention,mlp")


def test_rows_of_a_run(small_model: Path, small_data: Path, tmp_path: Path) -> None:
    assert run_ranks(1, one_run, small_model, small_data, tmp_path / "run") == 0
    rows = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    rows = [found for found in rows if "loss" in found]
    assert [found["step"] for found in rows] == [2, 4]
    for found in rows:
        parts = [found[f"seconds/{part}"] for part in ("data", "forward", "backward", "optimizer", "other")]
        assert sum(parts) == pytest.approx(found["seconds_per_step"], rel=0.02, abs=2e-4) and min(parts) >= 0
        assert found["tokens_per_second"] > found["samples_per_second"] and found["tflops_per_gpu"] > 0
        assert 0 < found["sigma_min"] <= found["sigma_mean"] <= found["sigma_max"] <= 1
        assert found["skipped_steps"] == found["skipped_samples"] == 0 and "mfu" not in found
    assert rows[1]["update_norm/attention_image"] > rows[0]["update_norm/attention_image"] > 0
