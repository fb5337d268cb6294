"""The moving average of the LoRA's weights: its formula, and its way through checkpoints, the model and files."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from tests.helpers.forked_ranks import import_once, run_ranks  # noqa: F401 (a fixture)
from tests.helpers.small_transformer import small_transformer
from tests.helpers.training_run import losses, train
from train.config.train_config import TrainConfig
from train.engine.ema import Ema
from train.saving.checkpoints import Checkpoints

ROOT = Path(__file__).resolve().parents[3]
CLIENT = {"model": "m", "lora": {}, "data": "d", "order": {}}


def test_the_formula() -> None:
    """Against float64; a step that was left out changes nothing; a short run's average has left its beginning."""
    master = torch.zeros(100)
    ema = Ema([master], 0.9)
    expected, generator = torch.zeros(100, dtype=torch.float64), torch.Generator().manual_seed(0)
    for step in range(1, 120):
        master.copy_(torch.randn(100, generator=generator))
        applied = step % 7 != 0
        ema.update(step, torch.tensor(applied) if step % 2 else applied)
        decay = min(0.9, (1 + step) / (10 + step))
        if applied:
            expected = decay * expected + (1 - decay) * master.double()
    torch.testing.assert_close(ema.averages[master].double(), expected, rtol=1e-5, atol=1e-7)
    early = Ema([master], 0.9999)
    master.fill_(1.0)
    for step in range(1, 50):
        early.update(step, True)
    assert early.averages[master].min() > 0.99


@pytest.mark.parametrize("pieces", [1, 3, 7])
def test_where_a_rank_s_part_begins_changes_no_bit(pieces: int) -> None:
    generator = torch.Generator().manual_seed(1)
    states = [torch.randn(1001, generator=generator) for _ in range(4)]

    def averaged(cuts: int) -> torch.Tensor:
        masters = [part.clone() for part in states[0].tensor_split(cuts)]
        ema = Ema(masters, 0.99)
        for step, state in enumerate(states[1:], start=1):
            for master, part in zip(masters, state.tensor_split(cuts), strict=True):
                master.copy_(part)
            ema.update(step, torch.tensor(True))
        return torch.cat(list(ema.averages.values()))

    assert torch.equal(averaged(pieces).view(torch.int32), averaged(2).view(torch.int32))


def make_engine(world: int, dtype: str = "float32", ema_decay: float | None = 0.9) -> Any:
    from train.config.zero_plan import ZeroPlan
    from train.engine.deepspeed_engine import initialize
    from train.engine.optimizer import Optimizer
    from train.lora.inject import inject_lora
    from train.lora.spec import LoraSpec
    from train.step.flow_matching_module import FlowMatchingModule

    kind = getattr(torch, dtype)
    transformer = small_transformer().to(kind)
    inject_lora(transformer, LoraSpec(("to_q", "img_mlp.net.2"), 3, 3.0), 0, kind)
    config = TrainConfig(
        model="m", data="d", deepspeed=ROOT / "ds_configs" / "zero2.json", output_path=Path("o"), dtype=dtype
    )
    module = FlowMatchingModule(transformer, "none", kind)
    return initialize(module, Optimizer(1e-2), ZeroPlan.from_config(config, world), ema_decay)


def train_steps(engine: Any, first: int, last: int, rank: int) -> None:
    from qwen_image.model.conditioning import Prompt

    for step in range(first, last):
        generator = torch.Generator().manual_seed(10 * step + rank)
        latents, noise = (torch.randn(1, 16, 1, 4, 4, generator=generator) for _ in range(2))
        prompt = Prompt(torch.randn(1, 5, 24, generator=generator).to(engine.module.dtype), None)
        engine.backward(engine(latents, noise, torch.tensor([0.5]), prompt).mean())
        engine.step()
        engine.ema.update(step + 1, bool(engine.was_step_applied()))


def whole_state(engine: Any) -> dict[str, torch.Tensor]:
    from train.engine.deepspeed_engine import whole_weights
    from train.engine.ema import EMA

    return {f"{kind}/{name}": t for kind in ("weight", EMA) for name, t in whole_weights(engine, kind).items()}


def saved_and_gone_on(world: int, root: Path) -> tuple[bool, list[str]]:
    """Four steps with a checkpoint after two, and the last two by a fresh engine: the same bits? And what was said."""
    import torch.distributed as dist

    said: list[str] = []
    checkpoints = Checkpoints(root / "run", keep=0, say=said.append)
    engine = make_engine(world, "bfloat16")
    train_steps(engine, 0, 2, dist.get_rank())
    checkpoints.save(engine, 2, CLIENT)
    train_steps(engine, 2, 4, dist.get_rank())
    fresh = make_engine(world, "bfloat16")
    checkpoints.load(fresh, checkpoints.find(str(root / "run" / "checkpoints" / "step-00000002")))
    train_steps(fresh, 2, 4, dist.get_rank())
    one, two = whole_state(engine), whole_state(fresh)
    same = all(torch.equal(one[name].view(torch.int32), two[name].view(torch.int32)) for name in one)
    plain = make_engine(world, "bfloat16", ema_decay=None)
    checkpoints.load(plain, checkpoints.find(str(root / "run")))
    Checkpoints(root / "plain").save(plain, 2, CLIENT)
    checkpoints.load(fresh, checkpoints.find(str(root / "plain")))
    began = whole_state(fresh)
    same &= all(torch.equal(t, began[name.replace("ema/", "weight/")]) for name, t in began.items())
    return same, said


def saved_again(world: int, root: Path) -> bool:
    engine = make_engine(world, "bfloat16")
    checkpoints = Checkpoints(root / f"again-{world}")
    checkpoints.load(engine, checkpoints.find(str(root / "run")))
    checkpoints.save(engine, 2, CLIENT)
    return True


def test_through_a_checkpoint_at_any_number_of_ranks(tmp_path: Path) -> None:
    same, said = run_ranks(2, saved_and_gone_on, 2, tmp_path)
    assert same
    assert any("is left out: this run has no --ema_decay" in line for line in said)
    assert any("holds no moving average: it begins at the weights of step 2" in line for line in said)
    file = tmp_path / "run" / "checkpoints" / "step-00000002" / "state.safetensors"
    state = load_file(file)
    assert any((state[name] != state[name.replace("ema/", "weight/")]).any() for name in state if name[:4] == "ema/")
    assert not any(name.startswith("ema/") for name in load_file(next(tmp_path.glob("plain/*/*/state.safetensors"))))
    for world in (1, 3):
        assert run_ranks(world, saved_again, world, tmp_path)
        copy = tmp_path / f"again-{world}" / "checkpoints" / "step-00000002" / "state.safetensors"
        assert copy.read_bytes() == file.read_bytes()


def swapped(world: int) -> list[bool]:
    """Inside, the model has the averages of all ranks, rounded; afterwards every bit is as before."""
    import torch.distributed as dist

    from train.engine.averaged_weights import averaged_weights
    from train.engine.deepspeed_engine import whole_weights
    from train.engine.ema import EMA
    from train.engine.optimizer_state import trainable_parameters

    engine = make_engine(world, "bfloat16")
    train_steps(engine, 0, 3, dist.get_rank())
    before = {name: p.detach().clone() for name, p in trainable_parameters(engine).items()}
    averages = whole_weights(engine, EMA)
    with averaged_weights(engine):
        inside = {name: p.detach().clone() for name, p in trainable_parameters(engine).items()}
    after = trainable_parameters(engine)
    return [
        all(torch.equal(inside[name], average.bfloat16()) for name, average in averages.items()),
        any(not torch.equal(inside[name], before[name]) for name in before),
        all(torch.equal(after[name], before[name]) for name in before),
    ]


def test_the_model_with_the_averages_in_it() -> None:
    assert run_ranks(2, swapped, 2) == [True, True, True]


def train_all(model: Path, data: Path, runs: list[tuple[Path, list[str]]]) -> list[int]:
    return [train(model, data, output, *more) for output, more in runs]


def test_a_run_with_an_average(small_model: Path, small_data: Path, tmp_path: Path) -> None:
    """Its numbers are those of a run without; the average has files and rows of its own; resuming changes no bit."""
    more = ["--learning_rate", "1e-2", "--validation_samples", "2", "--validation_steps", "2", "--save_steps", "2"]
    averaged = [*more, "--ema_decay", "0.8"]
    runs = {"plain": more, "whole": averaged, "halves": averaged}
    commands = [(tmp_path / name, flags) for name, flags in runs.items()]
    commands.insert(2, (tmp_path / "halves", [*averaged, "--max_steps", "2"]))
    assert run_ranks(1, train_all, small_model, small_data, commands) == [0] * 4
    assert losses(tmp_path / "whole") == losses(tmp_path / "plain") == losses(tmp_path / "halves")
    read: Callable[[str, str], dict[str, torch.Tensor]] = lambda run, name: load_file(tmp_path / run / name)  # noqa: E731
    trained, average = read("whole", "lora.safetensors"), read("whole", "lora-ema.safetensors")
    assert trained.keys() == average.keys() and any((trained[name] != average[name]).any() for name in trained)
    assert (tmp_path / "whole" / "lora-ema-2.safetensors").is_file()
    assert not list((tmp_path / "plain").glob("lora-ema*"))
    for name in ("lora-ema.safetensors", "lora.safetensors"):
        assert all(torch.equal(t, read("halves", name)[key]) for key, t in read("whole", name).items())
    rows = [json.loads(line) for line in (tmp_path / "whole" / "metrics.jsonl").read_text().splitlines()]
    own = {row["step"]: row["ema_validation_loss"] for row in rows if "ema_validation_loss" in row}
    trained_rows = {row["step"]: row["validation_loss"] for row in rows if "validation_loss" in row}
    assert own.keys() == {2, 4} and trained_rows.keys() == {0, 2, 4} and own[4] != trained_rows[4]
