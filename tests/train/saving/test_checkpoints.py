"""Checkpoints of an engine: going on is exact, at any number of ranks, from whatever moment the run was killed at."""

import json
import random
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from tests.helpers.forked_ranks import import_once, run_ranks  # noqa: F401 (a fixture)
from train.saving import checkpoint_folder
from train.saving.checkpoint_folder import FACTS, TENSORS
from train.saving.checkpoints import Checkpoints

GLOBAL_BATCH = 6  # micro-batches an optimizer step: divides by 1, 2 and 3 ranks
CLIENT = {"model": "m", "lora": {"rank": 3}, "data": "d", "order": {"seed": 0}}
ZERO = {"stage": 2, "overlap_comm": False, "contiguous_gradients": True, "reduce_scatter": True}


class Adapted(torch.nn.Module):
    """A frozen linear layer with a LoRA; sizes that no number of ranks divides."""

    def __init__(self, width: int, rank: int = 3) -> None:
        super().__init__()
        self.base = torch.nn.Linear(width, width)
        self.lora_A = torch.nn.Linear(width, rank, bias=False)
        self.lora_B = torch.nn.Linear(rank, width, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + torch.tanh(self.base(x)) + self.lora_B(self.lora_A(x))


def make_engine(world: int, dtype: str = "float32", **zero: Any) -> Any:
    import deepspeed

    torch.manual_seed(0)
    module = torch.nn.Sequential(Adapted(7), Adapted(7))
    module.requires_grad_(False)
    trained = [p.requires_grad_(True) for name, p in module.named_parameters() if "lora" in name]
    optimizer = torch.optim.AdamW(trained, lr=1e-2, weight_decay=0.1)
    buckets = {"reduce_bucket_size": 1000, "allgather_bucket_size": 1000}
    config = {
        "train_micro_batch_size_per_gpu": 2,
        "gradient_accumulation_steps": GLOBAL_BATCH // world,
        "gradient_clipping": 1.0,
        "zero_optimization": ZERO | buckets | zero,
        "zero_force_ds_cpu_optimizer": False,
        "bf16": {"enabled": dtype == "bfloat16"},
        "data_types": {"grad_accum_dtype": "fp32"},
        "communication_data_type": "fp32",
        "timers": {"throughput": {"enabled": False}},
    }
    options = {"optimizer": optimizer, "model_parameters": trained, "config": config, "dist_init_required": False}
    return deepspeed.initialize(model=module, **options)[0]


def train_steps(engine: Any, first: int, last: int, after: Callable[[int], object] = lambda step: None) -> list[float]:
    """Optimizer steps first … last - 1 on data that depend on the place in the stream; the mean loss of each step."""
    import torch.distributed as dist

    rank, world = dist.get_rank(), dist.get_world_size()
    dtype = next(engine.module.parameters()).dtype
    losses = []
    for step in range(first, last):
        total = torch.zeros(GLOBAL_BATCH, dtype=torch.float64)
        for turn in range(GLOBAL_BATCH // world):
            place = turn * world + rank
            generator = torch.Generator().manual_seed(step * GLOBAL_BATCH + place)
            x = torch.randn(2, 7, generator=generator).to(dtype)
            loss = (engine(x).float() - 1).square().mean()
            engine.backward(loss)
            engine.step()
            total[place] = loss.item()
        dist.all_reduce(total)
        losses.append(total.mean().item())
        after(step + 1)
    return losses


# ── exactness ────────────────────────────────────────────────────────────────────────────────────────────────────────

VARIANTS: dict[str, dict[str, Any]] = {
    "zero2": {},
    "zero2-bf16": {"dtype": "bfloat16"},
    "zero2-offload": {"offload_optimizer": {"device": "cpu"}},
}


def uninterrupted_and_resumed(world: int, root: Path, names: list[str]) -> dict[str, Any]:
    """For each variant: losses of 6 steps with a checkpoint after step 3, and of steps 3 … 5 by fresh engines."""
    found = {}
    for name in names:
        checkpoints = Checkpoints(root / name)
        engine = make_engine(world, **VARIANTS[name])
        saving = {3: lambda e=engine, c=checkpoints: c.save(e, 3, CLIENT)}
        whole = train_steps(engine, 0, 6, lambda step, saving=saving: saving.get(step, bool)())
        checkpoints.save(engine, 6, CLIENT)
        fresh = make_engine(world, **VARIANTS[name])
        checkpoints.load(fresh, checkpoints.find(str(root / name / "checkpoints" / "step-00000003")))
        resumed = train_steps(fresh, 3, 6)
        again = Checkpoints(root / f"{name}-again")
        again.save(fresh, 6, CLIENT)
        found[name] = (whole, resumed, fresh.global_steps)
    return found


def resumed_elsewhere(world: int, root: Path, names: list[str], first: int) -> dict[str, list[float]]:
    """Go on from step `first` to step `first` + 2 at this number of ranks, and save."""
    found = {}
    for name in names:
        checkpoints = Checkpoints(root / name, keep=0)
        engine = make_engine(world, **VARIANTS[name])
        checkpoints.load(engine, checkpoints.find(str(root / name / "checkpoints" / f"step-{first:08d}")))
        found[name] = train_steps(engine, first, first + 2)
        checkpoints.save(engine, first + 2, CLIENT)
    return found


@pytest.fixture(scope="module")
def two_ranks(tmp_path_factory) -> tuple[Path, dict[str, Any]]:
    root = tmp_path_factory.mktemp("two_ranks")
    return root, run_ranks(2, uninterrupted_and_resumed, 2, root, list(VARIANTS))


@pytest.mark.parametrize("name", VARIANTS)
def test_resuming_at_the_same_world_size_is_bit_equal(two_ranks, name):
    root, found = two_ranks
    whole, resumed, steps = found[name]
    assert resumed == whole[3:] and steps == 6 and len(set(whole)) == 6
    a, b = (load_file(root / folder / "checkpoints" / "step-00000006" / TENSORS) for folder in (name, f"{name}-again"))
    assert a.keys() == b.keys() and len(a) == 3 * 4
    for key in a:
        assert a[key].dtype == torch.float32 and torch.equal(a[key].view(torch.int32), b[key].view(torch.int32)), key
    assert all((a[key] != 0).any() for key in a)


def test_what_is_saved_is_the_whole_state_and_readable_by_safetensors(two_ranks):
    root, _ = two_ranks
    tensors = load_file(root / "zero2-offload" / "checkpoints" / "step-00000003" / TENSORS)
    names = {f"{i}.lora_{ab}.weight" for i in range(2) for ab in "AB"}
    assert set(tensors) == {f"{kind}/{name}" for kind in ("weight", "exp_avg", "exp_avg_sq") for name in names}
    assert tensors["weight/0.lora_A.weight"].shape == (3, 7) and (tensors["exp_avg_sq/1.lora_B.weight"] >= 0).all()
    facts = json.loads((root / "zero2-offload" / "checkpoints" / "step-00000003" / FACTS).read_text())
    assert facts["counters"] == {"step": 3.0} and facts["client"] == CLIENT


def test_two_ranks_then_one_then_three_follow_the_same_curve(two_ranks, tmp_path):
    root, found = two_ranks
    names = list(VARIANTS)
    for name in names:
        shutil.copytree(root / name, tmp_path / name)
    one = run_ranks(1, resumed_elsewhere, 1, tmp_path, names, 3)
    three = run_ranks(3, resumed_elsewhere, 3, tmp_path, names, 5)
    for name in names:
        tolerance = 2e-2 if "bf16" in name else 1e-5
        assert one[name] == pytest.approx(found[name][0][3:5], rel=tolerance)
        assert three[name][0] == pytest.approx(found[name][0][5], rel=tolerance)
        assert one[name][0] == found[name][0][3] or "bf16" in name or abs(one[name][0] - found[name][0][3]) < 1e-6


def save_and_compare(world: int, root: Path, source: Path) -> bool:
    """Load a checkpoint of another world size and save it again, without a step."""
    engine = make_engine(world)
    checkpoints = Checkpoints(root / str(world))
    checkpoints.load(engine, checkpoints.find(str(source)))
    checkpoints.save(engine, 3, CLIENT)
    return True


@pytest.mark.parametrize("world", [1, 3])
def test_another_world_size_holds_the_same_bits(two_ranks, tmp_path, world):
    source = two_ranks[0] / "zero2-offload" / "checkpoints" / "step-00000003"
    run_ranks(world, save_and_compare, world, tmp_path, source)
    copy = tmp_path / str(world) / "checkpoints" / "step-00000003" / TENSORS
    assert copy.read_bytes() == (source / TENSORS).read_bytes()


def save_before_any_step(root: Path) -> list[float]:
    engine = make_engine(1)
    checkpoints = Checkpoints(root)
    checkpoints.save(engine, 0, CLIENT)
    fresh = make_engine(1)
    checkpoints.load(fresh, checkpoints.find("auto"))
    return train_steps(fresh, 0, 2) + train_steps(engine, 0, 2)


def test_a_checkpoint_before_the_first_step(tmp_path):
    a, b, c, d = run_ranks(1, save_before_any_step, tmp_path)
    assert (a, b) == (c, d)


# ── killed at any moment ─────────────────────────────────────────────────────────────────────────────────────────────


def train_on(root: Path, world: int, last: int) -> None:
    """What the training loop does: resume, train, save after every step, write each loss down."""
    import torch.distributed as dist

    checkpoints = Checkpoints(root, say=lambda line: None)
    engine = make_engine(world)
    found = checkpoints.find("auto")
    if found:
        checkpoints.load(engine, found)
    for step in range(found.step if found else 0, last):
        (loss,) = train_steps(engine, step, step + 1)
        if dist.get_rank() == 0:
            with open(root / "losses", "a") as file:
                file.write(f"{step} {loss!r}\n")
        checkpoints.save(engine, step + 1, CLIENT)


def kill_again_and_again(root: Path, kills: int, seed: int, steps: int = 30) -> None:
    (root / "whole").mkdir(parents=True)
    (root / "killed").mkdir()
    run_ranks(2, train_on, root / "whole", 2, steps)
    expected = dict(line.split() for line in (root / "whole" / "losses").read_text().splitlines())
    assert len(expected) == steps
    chance = random.Random(seed)
    for _ in range(kills):
        ranks = run_ranks(2, train_on, root / "killed", 2, steps, wait=False)
        started, losses = time.time(), root / "killed" / "losses"
        lines = losses.read_text().count("\n") if losses.exists() else 0
        while (not losses.exists() or losses.read_text().count("\n") <= lines) and time.time() - started < 60:
            if not all(rank.is_alive() for rank in ranks):
                break
            time.sleep(0.002)
        time.sleep(chance.uniform(0, 0.05))
        for rank in ranks:
            rank.kill()
            rank.join()
    run_ranks(2, train_on, root / "killed", 2, steps)
    lines = [line.split() for line in (root / "killed" / "losses").read_text().splitlines()]
    assert {step for step, _ in lines} == set(expected)
    assert all(loss == expected[step] for step, loss in lines), "a step that was trained again gave another loss"


def test_killed_while_training_and_saving(tmp_path):
    kill_again_and_again(tmp_path, kills=3, seed=1, steps=20)


@pytest.mark.slow
def test_killed_twenty_times(tmp_path):
    kill_again_and_again(tmp_path, kills=20, seed=2, steps=120)


# ── what can go wrong ────────────────────────────────────────────────────────────────────────────────────────────────


def save_on_a_full_disk(root: Path) -> tuple[list[str], str, float]:
    engine, said = make_engine(2), []
    going_on = Checkpoints(root, on_error="continue", say=said.append)
    going_on.save(engine, 1, CLIENT)
    checkpoint_folder.shutil.disk_usage = lambda path: shutil._ntuple_diskusage(1, 1, 0)
    assert going_on.save(engine, 2, CLIENT) is None
    try:
        Checkpoints(root, on_error="stop").save(engine, 2, CLIENT)
    except OSError as error:
        return said, str(error), train_steps(engine, 0, 1)[0]
    raise AssertionError("no error")


def test_a_full_disk_stops_or_goes_on_by_policy_on_all_ranks(tmp_path):
    said, error, loss = run_ranks(2, save_on_a_full_disk, tmp_path)
    assert "not written" in said[0] and "MiB are free" in said[0] and "training goes on" in said[0]
    assert "step-00000002 not written" in error and loss > 0
    assert Checkpoints(tmp_path).find("auto").step == 1


def load_into_another_lora(root: Path, source: Path) -> str:
    engine = make_engine(1)
    checkpoints = Checkpoints(root)
    found = checkpoints.find(str(source))
    found.shapes["0.lora_A.weight"] = (4, 7)
    try:
        checkpoints.load(engine, found)
    except ValueError as error:
        return str(error)
    return ""


def test_another_shape_is_refused_by_name(two_ranks, tmp_path):
    error = run_ranks(1, load_into_another_lora, tmp_path, two_ranks[0] / "zero2" / "checkpoints" / "step-00000003")
    assert "0.lora_A.weight is (4, 7) in it and (3, 7) in this run" in error
