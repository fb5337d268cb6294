"""Loading under ZeRO-3: every rank holds exactly its part, with and without hpZ, and all ranks see the same error."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from demo.random_model import write_random_model
from qwen_image.loading.model_files import ModelSource, resolve_model
from qwen_image.loading.pinned_memory import Arena
from tests.helpers.forked_ranks import run_ranks
from train.base_model.zero3_loading import load_partitioned
from train.config.zero_plan import ZeroPlan

ROOT = Path(__file__).resolve().parents[3]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two blocks of width 128 over three files; two tensors of sizes that two or three ranks don't divide."""
    folder = tmp_path_factory.mktemp("model") / "random"
    write_random_model(folder, layers=2, heads=1, text_dim=63, file_bytes=1_000_000)
    return folder


def weights_of(model: Path) -> dict[str, torch.Tensor]:
    files = sorted((model / "transformer").glob("*.safetensors"))
    return {name: tensor for file in files for name, tensor in load_file(file).items()}


def load(model: Path, **zero: Any) -> Any:
    config = json.loads((ROOT / "ds_configs" / "zero3.json").read_text())
    config["zero_optimization"] |= zero
    config["train_micro_batch_size_per_gpu"] = 1
    files = resolve_model(ModelSource(str(model)), ("transformer", "scheduler"))
    return load_partitioned(files, torch.bfloat16, ZeroPlan.from_settings(config))


def gathered_equals_files(model: Path, zero: dict[str, Any]) -> str:
    """ "" or what differs, of everything on every rank."""
    import deepspeed
    import torch.distributed as dist

    transformer, weights = load(model, **zero), weights_of(model)
    world, differing = dist.get_world_size(), []
    parameters = dict(transformer.named_parameters())
    if parameters.keys() != weights.keys():
        return "names"
    for name, parameter in parameters.items():
        whole = weights[name].flatten()
        share = -(-whole.numel() // world)
        mine = whole[dist.get_rank() * share :][:share]
        if parameter.numel() != 0 or not torch.equal(parameter.ds_tensor[: len(mine)], mine):
            differing.append(f"part of {name}")
        if group := zero.get("zero_hpz_partition_size"):
            share = -(-whole.numel() // world) * world // group
            mine = whole[dist.get_rank() % group * share :][:share]
            if not torch.equal(parameter.ds_secondary_tensor[: len(mine)], mine):
                differing.append(f"second part of {name}")
    with deepspeed.zero.GatheredParameters(list(parameters.values())):
        differing += [name for name, p in parameters.items() if not torch.equal(p.data, weights[name])]
    found: list[Any] = [None] * world
    dist.all_gather_object(found, differing)
    return " ".join(str(item) for item in found if item)


@pytest.mark.parametrize(
    "world,zero",
    [(2, {}), (3, {"offload_param": {"device": "cpu", "pin_memory": True}}), (2, {"zero_hpz_partition_size": 2})],
    ids=["two", "three-offload", "hpz"],
)
def test_each_rank_reads_its_part(model: Path, world: int, zero: dict[str, Any]) -> None:
    assert run_ranks(world, gathered_equals_files, model, zero) == ""


@pytest.mark.slow
def test_hpz_inside_two_nodes(model: Path) -> None:
    assert run_ranks(4, gathered_equals_files, model, {"zero_hpz_partition_size": 2}) == ""


def errors_of_all_ranks(model: Path, only_rank: int | None) -> list[str]:
    import torch.distributed as dist

    if only_rank is not None and dist.get_rank() == only_rank:  # this rank sees a file that ends early
        model = model.with_name(model.name + "-damaged")
    try:
        load(model)
        error = "nothing"
    except ValueError as problem:
        error = str(problem)
    found: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(found, error)
    return found


@pytest.mark.parametrize("damage", ["shape", "missing", "truncated", "one rank"])
def test_all_ranks_raise_the_same(model: Path, tmp_path: Path, damage: str) -> None:
    copy = shutil.copytree(model, tmp_path / "model")
    file = sorted((copy / "transformer").glob("*.safetensors"))[-1]
    if damage == "shape":
        save_file(load_file(file) | {"proj_out.weight": torch.zeros(3, 4)}, file)
    elif damage == "missing":
        save_file({name: t for name, t in load_file(file).items() if name != "proj_out.weight"}, file)
    elif damage == "truncated":
        file.write_bytes(file.read_bytes()[:-100])
    else:
        damaged = shutil.copytree(copy, tmp_path / "model-damaged")
        file = damaged / "transformer" / file.name
        file.write_bytes(file.read_bytes()[:-100])
    message = {
        "shape": "proj_out.weight has shape [3, 4], but the configuration says [64, 128]",
        "missing": "1 tensors missing (first proj_out.weight)",
    }.get(damage, "is no readable safetensors file")
    errors = run_ranks(2, errors_of_all_ranks, copy, 1 if damage == "one rank" else None)
    assert all(message in error for error in errors), errors
    if damage == "one rank":
        assert errors[0].endswith("(on rank 1)")


def test_pinned_partitions_lie_in_arenas(monkeypatch: pytest.MonkeyPatch) -> None:
    taken: list[int] = []

    def pinned(elements: int, dtype: torch.dtype) -> torch.Tensor:
        taken.append(elements)
        return torch.empty(elements, dtype=dtype)

    monkeypatch.setattr("qwen_image.loading.pinned_memory.pinned_memory", pinned)
    monkeypatch.setattr("qwen_image.loading.pinned_memory.ARENA_BYTES", 2000)
    sizes = [300, 5, 640, 2000, 7]
    home = Arena(torch.device("cpu"), torch.bfloat16, pinned=True, remaining=sum(sizes))
    parts = [home.take(size) for size in sizes]
    for number, part in enumerate(parts):
        part.fill_(number)
    assert [len(part) for part in parts] == sizes
    assert all((part == number).all() for number, part in enumerate(parts)), "partitions overlap"
    assert taken == [1000, 1000, 2000, 7]  # elements; a partition larger than an arena has one of its own
