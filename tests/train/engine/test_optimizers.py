"""Every optimizer under ZeRO against its own class in a plain loop of torch, and through checkpoints to the bit.

The plain loop is written out: no DeepSpeed, no flat vector; gradients of all samples of a step are averaged over ranks and
micro-batches, clipped, and given to the package's class over plain float32 parameters.
"""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from qwen_image.model.conditioning import Prompt
from tests.helpers.forked_ranks import import_once, run_ranks  # noqa: F401 (a fixture)
from tests.helpers.small_transformer import small_transformer
from train.config.train_config import TrainConfig
from train.engine.optimizer import Optimizer
from train.engine.whole_optimizer import WholeOptimizer
from train.lora.inject import inject_lora, lora_parameters
from train.lora.spec import LoraSpec
from train.saving.checkpoints import Checkpoints
from train.step.flow_matching_module import FlowMatchingModule

ROOT = Path(__file__).resolve().parents[3]
CLIENT = {"model": "m", "lora": {}, "data": "d", "order": {}}
GLOBAL_BATCH = 6  # micro-batches an optimizer step: divides by 1, 2 and 3 ranks
STEPS = 20
DECAY = {"weight_decay": 0.05}
CASES: dict[str, dict[str, Any]] = {
    "adamw": {"learning_rate": 1e-2},
    "adamw lora+": {"learning_rate": 2e-3, "lora_plus_ratio": 8.0, **DECAY},
    "adafactor": {"optimizer": "adafactor", "learning_rate": 0.05},
    "adafactor lora+": {"optimizer": "adafactor", "learning_rate": 0.05, "lora_plus_ratio": 4.0, **DECAY},
    "muon": {"optimizer": "muon", "learning_rate": 1e-2, **DECAY},
    "muon lora+": {"optimizer": "muon", "learning_rate": 1e-2, "lora_plus_ratio": 3.0},
    "prodigy": {"optimizer": "prodigy", "optimizer_args": ("d0=1e-4", "use_bias_correction=true"), **DECAY},
    "schedulefree": {"optimizer": "schedulefree", "learning_rate": 1e-2, **DECAY},
    "schedulefree lora+": {"optimizer": "schedulefree", "learning_rate": 3e-3, "lora_plus_ratio": 4.0},
}


def make_config(zero: str = "zero2", dtype: str = "float32", **options: Any) -> TrainConfig:
    where = {"model": "m", "data": "d", "deepspeed": ROOT / "ds_configs" / f"{zero}.json", "output_path": Path("o")}
    return TrainConfig(**where, dtype=dtype, max_grad_norm=0.05, **options)


def make_module(dtype: str = "float32", dora: bool = False) -> FlowMatchingModule:
    kind = getattr(torch, dtype)
    transformer = small_transformer().to(kind)
    inject_lora(transformer, LoraSpec(("to_q", "img_mlp.net.2"), 3, 3.0, dora=dora), 0, kind)
    return FlowMatchingModule(transformer, "none", kind)


def make_engine(world: int, config: TrainConfig, dora: bool = False, ema_decay: float | None = None) -> Any:
    from train.config.zero_plan import ZeroPlan
    from train.engine.deepspeed_engine import initialize

    config = replace(config, gradient_accumulation_steps=GLOBAL_BATCH // world)
    zero = ZeroPlan.from_config(config, world)
    return initialize(make_module(config.trained_dtype, dora), Optimizer.from_config(config), zero, ema_decay)


def loss_of(module: Any, dtype: torch.dtype, step: int, place: int) -> torch.Tensor:
    """Of micro-batch `place` of a step: the same whoever computes it."""
    generator = torch.Generator().manual_seed(100 * step + place)
    latents, noise = (torch.randn(1, 16, 1, 4, 4, generator=generator) for _ in range(2))
    prompt = Prompt(torch.randn(1, 5, 24, generator=generator).to(dtype), None)
    return module(latents, noise, torch.tensor([0.5]), prompt).mean()


def rate_at(step: int, peak: float) -> float:
    """A warm-up over four steps, then constant."""
    return peak * min(1.0, (step + 1) / 4)


def train_steps(engine: Any, first: int, last: int, peak: float, spoiled: int | None = None) -> list[float]:
    """Optimizer steps first … last - 1; the mean loss of each. Step `spoiled` has a loss that is not finite."""
    import torch.distributed as dist

    rank, world, losses = dist.get_rank(), dist.get_world_size(), []
    for step in range(first, last):
        total = torch.zeros(GLOBAL_BATCH, dtype=torch.float64)
        for turn in range(GLOBAL_BATCH // world):
            place = turn * world + rank
            loss = loss_of(engine, engine.module.dtype, step, place)
            engine.backward(loss * (float("nan") if step == spoiled else 1.0))
            for group in engine.optimizer.param_groups:
                group["lr"] = rate_at(step, peak)
            engine.step()
            total[place] = loss.item()
        dist.all_reduce(total)
        losses.append(total.mean().item())
    return losses


def plain_loop(name: str, dora: bool = False) -> tuple[list[float], dict[str, torch.Tensor]]:
    """Losses, and the LoRA by short name (schedule-free's in eval mode), of torch and the packages alone."""
    options = CASES[name]
    module = make_module(dora=dora)
    trained = lora_parameters(module.transformer)
    ups = [p for n, p in trained.items() if n.endswith("lora_B")]
    rest = [p for n, p in trained.items() if not n.endswith("lora_B")]
    ratio = options.get("lora_plus_ratio", 1.0)
    groups = [{"params": rest, "times": 1.0}, {"params": ups, "times": ratio}]
    kind, decay = options.get("optimizer", "adamw"), {"weight_decay": options.get("weight_decay", 0.01)}
    if kind == "adafactor":
        optimizers = [torch.optim.Adafactor(groups, weight_decay=options.get("weight_decay", 0.0))]
    elif kind == "muon":
        for group in groups:
            group["params"] = [p for p in group["params"] if p.ndim == 2]  # type: ignore[attr-defined]
        optimizers = [torch.optim.Muon(groups, adjust_lr_fn="match_rms_adamw", **decay)]
        vectors = [p for p in trained.values() if p.ndim == 1]
        optimizers += [torch.optim.AdamW([{"params": vectors, "times": 1.0}], **decay)] if vectors else []
    elif kind == "prodigy":
        from prodigyopt import Prodigy

        optimizers = [Prodigy(groups, d0=1e-4, use_bias_correction=True, **decay)]
    elif kind == "schedulefree":
        from schedulefree import AdamWScheduleFree

        optimizers = [AdamWScheduleFree(groups, **decay)]
        optimizers[0].train()
    else:
        optimizers = [torch.optim.AdamW(groups, **decay)]
    losses, peak = [], options.get("learning_rate", 1.0)
    for step in range(STEPS):
        total = torch.stack([loss_of(module, module.dtype, step, place) for place in range(GLOBAL_BATCH)]).mean()
        total.backward()
        torch.nn.utils.clip_grad_norm_(trained.values(), 0.05)
        for optimizer in optimizers:
            for group in optimizer.param_groups:
                group["lr"] = rate_at(step, peak) * group["times"]
            optimizer.step()
            optimizer.zero_grad()
        losses.append(total.item())
    if kind == "schedulefree":
        optimizers[0].eval()
    return losses, {name: parameter.detach() for name, parameter in trained.items()}


def all_losses(world: int, cases: list[tuple[str, str, bool]]) -> dict[tuple[str, str, bool], Any]:
    """For each case, its losses and its LoRA file's weights by short name."""
    from train.engine.deepspeed_engine import whole_weights
    from train.engine.optimizer_state import lora_kind
    from train.lora.inject import short_name

    found = {}
    for case in cases:
        name, zero, dora = case
        config = make_config(zero, **CASES[name])
        engine = make_engine(world, config, dora)
        losses = train_steps(engine, 0, STEPS, config.peak_learning_rate)
        weights = whole_weights(engine, lora_kind(engine))
        found[case] = losses, {short_name(key).removeprefix("transformer."): w.numpy() for key, w in weights.items()}
    return found


def check_equal_plain(world: int, cases: list[tuple[str, str, bool]]) -> None:
    found = run_ranks(world, all_losses, world, cases)
    for (name, zero, dora), (losses, weights) in found.items():
        expected, plain = plain_loop(name, dora)
        assert abs(expected[-1] - expected[0]) > 1e-3 * expected[0], name
        # Muon's products round to bfloat16, so that a last bit of float32 may become one of those
        loose = 200 if name.startswith("muon") else 1
        assert losses == pytest.approx(expected, rel=5e-6 * loose), (name, zero)
        assert weights.keys() == plain.keys()
        worst = max((torch.from_numpy(weights[key]) - plain[key]).abs().max().item() for key in plain)
        size = max(value.abs().max().item() for value in plain.values())
        assert worst < 2e-5 * loose * size, (name, zero, worst, size)


@pytest.mark.parametrize("world,zero", [(1, "zero2_offload"), (2, "zero2")])
def test_twenty_steps_equal_the_plain_loop(world: int, zero: str) -> None:
    """Of every optimizer, alone and under LoRA+."""
    check_equal_plain(world, [(name, zero, False) for name in CASES])


def test_offloaded_on_two_ranks() -> None:
    check_equal_plain(2, [(name, "zero2_offload", False) for name in ("muon lora+", "prodigy")])


@pytest.mark.slow
@pytest.mark.parametrize("world,zero", [(1, "zero2"), (2, "zero2_offload"), (3, "zero2")])
def test_twenty_steps_in_the_other_cases(world: int, zero: str) -> None:
    check_equal_plain(world, [(name, zero, False) for name in CASES])


def test_a_dora_s_magnitudes_under_each_optimizer() -> None:
    """Muon leaves these vectors to AdamW; Adafactor doesn't factorize them; LoRA+ leaves them at the common rate."""
    check_equal_plain(1, [(name, "zero2", True) for name in CASES if name != "adamw"])


# ── through checkpoints ──────────────────────────────────────────────────────────────────────────────────────────────

KINDS = {
    "adamw lora+": {"exp_avg", "exp_avg_sq"},
    "adafactor": {"row_var", "col_var"},
    "muon": {"momentum_buffer"},
    "prodigy": {"exp_avg", "exp_avg_sq", "s", "p0"},
    "schedulefree lora+": {"exp_avg_sq", "z", "average"},
}


def saved_and_gone_on(world: int, root: Path, names: list[str]) -> dict[str, bool]:
    """Four steps with a checkpoint after two, and the last two by a fresh engine: the same bits in the next checkpoint?"""
    same = {}
    for name in names:
        config = make_config(dtype="bfloat16", **CASES[name])
        ema = None if name.startswith("schedulefree") else 0.8
        checkpoints = Checkpoints(root / name, keep=0, say=lambda line: None)
        engine = make_engine(world, config, dora=True, ema_decay=ema)
        peak = config.peak_learning_rate
        train_steps(engine, 0, 2, peak)
        checkpoints.save(engine, 2, CLIENT)
        train_steps(engine, 2, 4, peak)
        checkpoints.save(engine, 4, CLIENT)
        fresh = make_engine(world, config, dora=True, ema_decay=ema)
        checkpoints.load(fresh, checkpoints.find(str(root / name / "checkpoints" / "step-00000002")))
        train_steps(fresh, 2, 4, peak)
        again = Checkpoints(root / f"{name}-again", say=lambda line: None)
        again.save(fresh, 4, CLIENT)
        files = [root / n / "checkpoints" / "step-00000004" / "state.safetensors" for n in (name, f"{name}-again")]
        same[name] = files[0].read_bytes() == files[1].read_bytes()
    return same


def saved_again(world: int, root: Path, names: list[str]) -> dict[str, list[float]]:
    """Load what two ranks saved and save it again; then the losses of two steps."""
    found = {}
    for name in names:
        config = make_config(dtype="bfloat16", **CASES[name])
        engine = make_engine(world, config, dora=True, ema_decay=None if name.startswith("schedulefree") else 0.8)
        checkpoints = Checkpoints(root / f"{name}-{world}")
        checkpoints.load(engine, checkpoints.find(str(root / name / "checkpoints" / "step-00000002")))
        checkpoints.save(engine, 2, CLIENT)
        found[name] = train_steps(engine, 2, 4, config.peak_learning_rate)
    return found


def test_through_a_checkpoint_at_any_number_of_ranks(tmp_path: Path) -> None:
    names = list(KINDS)
    assert run_ranks(2, saved_and_gone_on, 2, tmp_path, names) == dict.fromkeys(names, True)
    losses = {world: run_ranks(world, saved_again, world, tmp_path, names) for world in (1, 2, 3)}
    for name in names:
        folder = tmp_path / name / "checkpoints" / "step-00000002"
        for world in (1, 2, 3):
            copy = tmp_path / f"{name}-{world}" / "checkpoints" / "step-00000002"
            assert (copy / "state.safetensors").read_bytes() == (folder / "state.safetensors").read_bytes(), (
                name,
                world,
            )
            assert losses[world][name] == pytest.approx(losses[2][name], rel=2e-2), (name, world)
        state = load_file(folder / "state.safetensors")
        found = {key.partition("/")[0] for key in state} - {"weight", "ema"}
        vectors = {"muon": {"exp_avg", "exp_avg_sq"}, "adafactor": {"variance"}}
        assert found == KINDS[name] | vectors.get(name, set()), name
        facts = json.loads((folder / "state.json").read_text())
        assert all(tensor.dtype == torch.float32 for tensor in state.values())
        assert [group["k"] for group in facts.get("groups", [])] == {"prodigy": [2], "schedulefree lora+": [2, 2]}.get(
            name, []
        )


def toggled(root: Path) -> list[bool]:
    """An AdamW checkpoint goes on under LoRA+ and back: its moments are the same tensors either way."""
    results = []
    for first, second in (("adamw", "adamw lora+"), ("adamw lora+", "adamw")):
        checkpoints = Checkpoints(root / first)
        engine = make_engine(1, make_config(**CASES[first]))
        train_steps(engine, 0, 2, 1e-3)
        checkpoints.save(engine, 2, CLIENT)
        other = make_engine(1, make_config(**CASES[second]))
        checkpoints.load(other, checkpoints.find(str(root / first)))
        copy = Checkpoints(root / f"{first}-copy")
        copy.save(other, 2, CLIENT)
        files = [next((root / name).rglob("state.safetensors")).read_bytes() for name in (first, f"{first}-copy")]
        results.append(files[0] == files[1])
        train_steps(other, 2, 3, 1e-3)
    return results


def test_lora_plus_may_change_when_adamw_goes_on(tmp_path: Path) -> None:
    assert run_ranks(1, toggled, tmp_path) == [True, True]


# ── what the others promise ──────────────────────────────────────────────────────────────────────────────────────────


def left_out(world: int, names: list[str], dtype: str) -> dict[str, list[bool]]:
    """Three steps, the second not finite: was each taken, and did the second change nothing?"""
    import torch.distributed as dist

    from train.engine import whole_state
    from train.engine.optimizer_state import whole_of
    from train.engine.zero2_step import step_applied

    found = {}
    for name in names:
        config = make_config(dtype=dtype, **CASES[name])
        engine = make_engine(world, config)

        def state(engine: Any = engine) -> list[torch.Tensor]:
            whole = whole_of(engine)
            assert whole is not None
            tensors = [t.clone() for by in whole_state.tensors(whole).values() for t in by.values()]
            return [whole.masters.detach().clone(), *tensors, torch.tensor([*whole_state.counters(whole).values()])]

        taken, before = [], []
        for step in range(3):
            before = state()
            train_steps(engine, step, step + 1, config.peak_learning_rate, spoiled=1)
            taken.append(bool(step_applied(engine)))
            if step == 1:
                taken.append(all(torch.equal(a, b) for a, b in zip(before, state(), strict=True)))
        everywhere: list[Any] = [None] * world
        masters = whole_of(engine).masters.detach()  # type: ignore[union-attr]
        dist.all_gather_object(everywhere, masters)
        found[name] = [*taken, all(torch.equal(other, masters) for other in everywhere)]
    return found


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_step_that_is_not_finite_is_left_out_on_all_ranks(dtype: str) -> None:
    names = list(KINDS)
    expected = [True, False, True, True, True]  # step 1, step 2 and nothing changed, step 3; the ranks' masters are one
    assert run_ranks(2, left_out, 2, names, dtype) == dict.fromkeys(names, expected)


def judged_on_the_device() -> list[bool]:
    """A fused AdamW under LoRA+, as on a GPU: the same steps as judged by DeepSpeed."""
    from train.engine.optimizer_state import whole_of
    from train.engine.zero2_step import can_judge_on_device, judge_on_device

    adamw, found = torch.optim.AdamW.__init__, []
    for fused in (True, False):
        torch.optim.AdamW.__init__ = lambda *all, f=fused, **more: adamw(*all, **more | {"fused": f})  # type: ignore[method-assign]
        engine = make_engine(1, make_config(dtype="bfloat16", **CASES["adamw lora+"]))
        assert can_judge_on_device(engine.optimizer) == fused
        train_steps(engine, 0, 5, 2e-3, spoiled=2)
        found.append(whole_of(engine).masters.detach().clone())  # type: ignore[union-attr]
    assert judge_on_device is not None
    return [torch.allclose(found[0], found[1], rtol=1e-4, atol=1e-7), bool(torch.isfinite(found[0]).all())]


def test_two_rates_are_judged_on_the_device_too() -> None:
    assert run_ranks(1, judged_on_the_device) == [True, True]


def averages_in_place(world: int) -> list[bool]:
    """Under schedule-free the model inside has the package's own x; afterwards every bit of the training is as before."""
    from train.engine.averaged_weights import lora_weights
    from train.engine.optimizer_state import trainable_parameters, whole_of

    engine = make_engine(world, make_config(dtype="bfloat16", **CASES["schedulefree"]))
    with lora_weights(engine):
        pass  # before the first step
    train_steps(engine, 0, 3, 1e-2)
    whole = whole_of(engine)
    assert whole is not None
    masters, before = (
        whole.masters.detach().clone(),
        [p.detach().clone() for p in trainable_parameters(engine).values()],
    )
    with lora_weights(engine):
        inside = [p.detach().clone() for p in trainable_parameters(engine).values()]
    same = all(torch.equal(a, b) for a, b in zip(before, trainable_parameters(engine).values(), strict=True))
    same &= torch.equal(masters, whole.masters.detach())
    whole.inner[0].eval()  # type: ignore[attr-defined]
    theirs = [m.detach().to(torch.bfloat16) for m in whole.matrices.values()]
    return [same, all(map(torch.equal, inside, theirs)), not all(map(torch.equal, inside, before))]


def test_the_model_with_schedule_free_s_average_in_it() -> None:
    assert run_ranks(2, averages_in_place, 2) == [True, True, True]


def test_warnings_of_rates_and_of_options_that_do_nothing() -> None:
    def told(**options: Any) -> str:
        return "; ".join(Optimizer.from_config(make_config(**options)).warnings())

    assert told() == told(optimizer="prodigy") == told(optimizer="adafactor") == told(optimizer="muon") == ""
    assert "0.0001 is far below Prodigy's usual 1" in told(optimizer="prodigy", learning_rate=1e-4)
    assert "0.0001 is far below Adafactor's usual 0.01" in told(optimizer="adafactor", learning_rate=1e-4)
    assert "learning rate 0.01 × 16 is far above AdamW's usual" in told(learning_rate=0.01, lora_plus_ratio=16)
    assert "--adam_beta1" in told(optimizer="adafactor", adam_beta2=0.99)
    original = ("adjust_lr_fn=original",)
    assert told(optimizer="muon", learning_rate=0.5, optimizer_args=original) == ""
    assert "far above Muon's" in told(optimizer="muon", learning_rate=0.5)


def test_what_is_not_given_is_the_optimizer_s_own() -> None:
    optimizers = {
        name: Optimizer.from_config(make_config(optimizer=name)) for name in ("adamw", "adafactor", "prodigy")
    }
    assert optimizers["adamw"] == Optimizer()
    assert {name: (o.learning_rate, o.weight_decay) for name, o in optimizers.items()} == {
        "adamw": (1e-4, 0.01),
        "adafactor": (1e-2, 0.0),
        "prodigy": (1.0, 0.01),
    }
    assert not optimizers["prodigy"].arguments["safeguard_warmup"]
    warm = make_config(optimizer="prodigy", lr_warmup_steps=5, optimizer_args=("d_coef=2",))
    assert Optimizer.from_config(warm).arguments["safeguard_warmup"] is True
    assert "d_coef 2.0" in Optimizer.from_config(warm).line()
    told = Optimizer.from_config(replace(warm, optimizer_args=("safeguard_warmup=false",)))
    assert told.arguments["safeguard_warmup"] is False


@pytest.mark.parametrize("name", ["adamw", *KINDS])
def test_the_bytes_of_the_memory_plan_are_those_of_the_tensors(name: str) -> None:
    """Masters and state of one rank, counted; a vector's share of Adafactor's is small in a LoRA."""
    optimizer = Optimizer.from_config(make_config(**CASES[name]))
    flat = torch.nn.Parameter(torch.randn(8 * 300 + 200 * 8))
    shapes = {"a.lora_A.default.weight": torch.Size((8, 300)), "a.lora_B.default.weight": torch.Size((200, 8))}
    total = flat.numel()
    if not optimizer.whole:
        assert optimizer.bytes(total, 1) == 12 * total and optimizer.state_bytes(total, 2) == 4 * total
        return
    whole = WholeOptimizer(flat, shapes, optimizer)
    for matrix in (whole.masters, *whole.matrices.values()):
        matrix.grad = torch.randn_like(matrix)
    for inner in whole.inner:
        inner.step()
    held = {
        t.data_ptr(): t.nbytes for o in whole.inner for s in o.state.values() for t in s.values() if torch.is_tensor(t)
    }
    assert sum(held.values()) <= optimizer.state_bytes(total, 1) * 1.01 + 64
    assert sum(held.values()) > optimizer.state_bytes(total, 1) * (0.4 if name == "adafactor" else 0.99)
    kept = optimizer.bytes(total, 1) - optimizer.step_bytes(total)
    assert kept == 4 * total + whole.masters.nbytes + optimizer.state_bytes(
        total, 1
    )  # ZeRO's piece of the masters as well
