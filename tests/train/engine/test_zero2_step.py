"""ZeRO-2's step judged on the device takes the same steps as DeepSpeed's own; the verdicts reach the host one step later."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from train.engine.zero2_step import can_judge_on_device, judge_on_device, lighten, step_applied
from train.process.ranks import join_process_group
from train.watching.loss_watch import LossWatch

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
WIDTH = 300


def make_engine(dtype: torch.dtype = torch.bfloat16, fused: bool = True, clip: float = 0.5) -> Any:
    import deepspeed

    join_process_group()
    torch.manual_seed(0)
    module = torch.nn.Linear(WIDTH, 1, bias=False).to(DEVICE, dtype)
    optimizer = torch.optim.AdamW(module.parameters(), lr=1e-2, weight_decay=0.1, fused=fused)
    config = {
        "train_micro_batch_size_per_gpu": 1,
        "gradient_clipping": clip,
        "zero_optimization": {"stage": 2, "overlap_comm": False},
        "zero_force_ds_cpu_optimizer": False,
        "bf16": {"enabled": dtype == torch.bfloat16},
        "data_types": {"grad_accum_dtype": "fp32"},
        "communication_data_type": "fp32",
        "timers": {"throughput": {"enabled": False}},
    }
    return deepspeed.initialize(model=module, optimizer=optimizer, config=config, dist_init_required=False)[0]


def train(engine: Any, factors: list[float]) -> list[tuple[bool, float, torch.Tensor, torch.Tensor, float]]:
    """A step for each factor of the loss: was it taken, the norm, the bf16 weights, AdamW's moments and its step count."""
    results = []
    for number, factor in enumerate(factors):
        x = torch.randn(1, WIDTH, generator=torch.Generator().manual_seed(number)).to(DEVICE, torch.bfloat16)
        engine.backward(engine(x).float().square().mean() * factor)
        engine.step()
        (state,) = engine.optimizer.optimizer.state.values()
        norm = float(engine.get_global_grad_norm())
        moments = torch.stack([state["exp_avg"], state["exp_avg_sq"]]).clone()
        weights = next(engine.module.parameters()).detach().clone()
        results.append((bool(step_applied(engine)), norm, weights, moments, float(state["step"])))
    return results


@pytest.mark.parametrize("clip", [0.5, 0.0])
def test_the_same_steps_as_deepspeeds_own(clip: float) -> None:
    """Small gradients, ones that are clipped, NaN and ∞; what is left out leaves weights and moments as they were."""
    factors = [1e-3, 100.0, float("nan"), 1.0, float("inf"), 30.0]
    own, ours = make_engine(clip=clip), make_engine(clip=clip)
    lighten(own.optimizer)
    lighten(ours.optimizer)
    assert can_judge_on_device(ours.optimizer)
    judge_on_device(ours.optimizer)
    expected, actual = train(own, factors), train(ours, factors)
    assert [taken for taken, *_ in actual] == [True, True, False, True, False, True]
    assert [norm == float("inf") for _, norm, *_ in actual] == [False, False, True, False, True, False]
    for one, other in zip(actual, expected, strict=True):
        assert one[:2] == other[:2] and one[4] == other[4]
        assert torch.equal(one[2], other[2]) and torch.equal(one[3], other[3])
    assert torch.equal(actual[2][2], actual[1][2]) and not torch.equal(actual[3][2], actual[2][2])


def test_where_deepspeed_looks_itself_it_goes_on_to() -> None:
    assert not can_judge_on_device(make_engine(torch.float32).optimizer)
    engine = make_engine(fused=False)
    assert not can_judge_on_device(engine.optimizer)
    assert [taken for taken, *_ in train(engine, [1.0, float("nan"), 1.0])] == [True, False, True]


@pytest.mark.skipif(DEVICE.type != "cuda", reason="needs a GPU to wait for")
def test_a_step_waits_for_nothing() -> None:
    engine = make_engine()
    lighten(engine.optimizer)
    judge_on_device(engine.optimizer)
    train(engine, [1.0, 1.0])
    watch = LossWatch(print, DEVICE)
    batch: Any = SimpleNamespace(keys=["a"], sigma=torch.tensor([0.5]))
    loss = engine(torch.ones(1, WIDTH, device=DEVICE, dtype=torch.bfloat16)).float().square().mean()
    torch.cuda.set_sync_debug_mode("error")
    try:
        engine.backward(loss)
        engine.step()
        watch.saw(batch, loss[None])
        watch.stepped(1, engine)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert watch.took(all_steps=True)


def engine_that(applied: bool) -> Any:
    optimizer = SimpleNamespace(param_groups=[{"lr": 1e-4}])
    return SimpleNamespace(
        optimizer=optimizer, was_step_applied=lambda: applied, get_global_grad_norm=lambda: torch.tensor(0.5)
    )


def test_verdicts_come_one_step_later_and_all_before_something_is_written() -> None:
    join_process_group()
    said: list[str] = []
    watch = LossWatch(said.append, DEVICE)

    def step(number: int, loss: float, applied: bool = True) -> None:
        batch: Any = SimpleNamespace(keys=[f"sample {number}"], sigma=torch.tensor([0.25]))
        watch.saw(batch, torch.tensor([loss], device=DEVICE))
        watch.stepped(number, engine_that(applied))

    step(1, 1.0)
    assert watch.took(all_steps=False)
    step(2, float("nan"), applied=False)
    assert watch.took(all_steps=False) and not said
    step(3, 2.0)
    assert not watch.took(all_steps=False)
    numbers = "; learning rate 0.0001, gradient norm 0.5"
    assert said == [f"step 2 is not finite and was left out (1 so far): samples sample 2 at σ 0.25 (loss nan){numbers}"]
    step(4, 6.0, applied=False)
    assert not watch.took(all_steps=True) and watch.took(all_steps=True)
    assert said[1:] == [
        f"step 4 is not finite and was left out (2 so far): the gradient overflowed, all losses are finite{numbers}"
    ]
    assert watch.state() == {"steps": 2, "sums": [3.0]} and watch.mean() == 1.5
    assert watch.mean() != watch.mean()  # no step since: NaN
    resumed = LossWatch(said.append, DEVICE, {"steps": 2, "sums": [3.0]})
    assert resumed.mean() == 1.5
