"""Trial steps and the choice they lead to: counted bytes are real, the choice is the best that fits, nothing else changes."""

from collections.abc import Callable
from functools import partial
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode

from qwen_image.free_memory import GIB
from qwen_image.model.rotary import rotary_table
from qwen_image.model.sizes import TransformerConfig
from qwen_image.model.transformer import QwenImageTransformer
from train.fit import activation_checkpointing as checkpointing
from train.fit.activation_checkpointing import (
    CheckpointingPlan,
    PeakWatch,
    choose,
    plan_checkpointing,
    set_checkpointed_blocks,
)
from train.fit.trial_step import Trial, try_step
from train.loader.batch_shapes import BatchOptions, BatchShape, largest_batch, random_arguments
from train.lora.inject import inject_lora
from train.lora.spec import LoraSpec
from train.step import offload_activations as activation_offload
from train.step.flow_matching_module import FlowMatchingModule
from train.step.offload_activations import ActivationOffload

CPU = torch.device("cpu")
SHAPE = BatchShape(batch=2, height=96, width=64, text=12, padded=True)
BLOCKS = 6


def make_module(targets: tuple[str, ...] = ("to_q", "add_k_proj", "img_mlp.net.2"), dropout: float = 0) -> Any:
    torch.manual_seed(0)
    shape = TransformerConfig(
        num_layers=BLOCKS,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=24,
        axes_dims_rope=(4, 6, 6),
    )
    transformer = QwenImageTransformer(shape)
    for parameter in transformer.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    inject_lora(transformer, LoraSpec(targets, 4, 4.0, dropout=dropout))
    return FlowMatchingModule(transformer, "none", torch.float32)


class Storages(TorchDispatchMode):
    """Every piece of memory that operations inside return, by weak reference: what is left of it is what is kept."""

    def __init__(self) -> None:
        super().__init__()
        self.made: dict[int, tuple[StorageWeakRef, int]] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for tensor in result if isinstance(result, (tuple, list)) else (result,):
            if isinstance(tensor, torch.Tensor):
                storage = tensor.untyped_storage()
                self.made[storage._cdata] = StorageWeakRef(storage), storage.nbytes()
        return result

    def alive(self) -> int:
        return sum(size for reference, size in self.made.values() if not reference.expired())


@pytest.mark.parametrize("targets", [("to_q",), ("to_q", "add_v_proj"), ("img_mlp.net.0.proj", "txt_mlp.net.2")])
@pytest.mark.parametrize("recomputed", [0, 2, BLOCKS])
def test_counted_bytes_are_those_that_live_between_forward_and_backward(targets: Any, recomputed: int) -> None:
    module = make_module(targets)
    module.transformer.checkpointed_blocks = recomputed
    arguments = random_arguments(SHAPE, 24, CPU)
    trial = try_step(module, arguments)
    assert trial is not None
    module.train()
    known = {t.untyped_storage()._cdata for t in [*module.parameters(), *module.buffers()]}
    grids = ((SHAPE.height // 16, SHAPE.width // 16),)
    rotary = rotary_table(SHAPE.text, grids, (4, 6, 6), CPU)  # kept anyway, for all steps
    known |= {t.untyped_storage()._cdata for t in (*arguments[:3], *arguments[3][:2], *rotary)}
    with Storages() as storages:
        loss = module(*arguments).mean()
        storages.made = {name: kept for name, kept in storages.made.items() if name not in known}
        alive = storages.alive()
    assert loss.requires_grad
    # the loss itself and what Python still holds of the last operations are alive too
    counted = trial.kept - (sum(t.nbytes for t in rotary) if recomputed < BLOCKS else 0)
    assert counted == pytest.approx(alive, rel=0.01)


def test_a_block_keeps_the_same_wherever_it_stands() -> None:
    module = make_module()
    kept = []
    for recomputed in range(BLOCKS + 1):
        module.transformer.checkpointed_blocks = recomputed
        trial = try_step(module, random_arguments(SHAPE, 24, CPU))
        assert trial is not None
        kept.append(trial.kept)
    steps = -np.diff(kept)
    assert len(set(steps[1:-1])) == 1, "blocks in the middle differ"
    assert steps[0] <= steps[1] and 0 < steps[-1] < steps[1], "the first needs no gradient, the last has no text half"


def test_a_trial_step_changes_nothing() -> None:
    module = make_module(dropout=0.5).eval()
    before, state = {n: p.clone() for n, p in module.named_parameters()}, torch.random.get_rng_state()
    hooked: list[object] = []
    for parameter in module.parameters():
        if parameter.requires_grad:
            parameter.register_post_accumulate_grad_hook(hooked.append)
    module.graphs = graphs = object()
    assert try_step(module, random_arguments(SHAPE, 24, CPU)) is not None
    assert torch.equal(torch.random.get_rng_state(), state) and not module.training and module.graphs is graphs
    assert not hooked and all(parameter.grad is None for parameter in module.parameters())
    assert all(torch.equal(parameter, before[name]) for name, parameter in module.named_parameters())


@pytest.mark.parametrize("error", [torch.OutOfMemoryError("x"), RuntimeError("cuDNN error: CUDNN_STATUS_ALLOC_FAILED")])
def test_running_out_of_memory_leaves_nothing_behind(monkeypatch: pytest.MonkeyPatch, error: RuntimeError) -> None:
    monkeypatch.setattr(activation_offload, "SMALLEST_BYTES", 0)
    module = make_module()
    module.transformer.checkpointed_blocks = BLOCKS
    module.transformer.saved_inputs = offload = ActivationOffload(CPU)
    arguments = random_arguments(SHAPE, 24, CPU)
    with monkeypatch.context() as patch:
        patch.setattr(module.transformer.proj_out, "forward", partial(fail, error))
        assert try_step(module, arguments) is None
    assert not offload.parked
    assert try_step(module, arguments, prepare=lambda: None) is not None
    with pytest.raises(RuntimeError, match="shapes"):
        try_step(module, arguments, prepare=partial(fail, RuntimeError("shapes do not match")))


def fail(error: RuntimeError, *_: object) -> None:
    raise error


def simulated(resident: int, block: int, inputs: int, work: int, memory: int) -> Callable[[int], Trial | None]:
    """Trial steps on a card of `memory` bytes."""

    def trial(recomputed: int) -> Trial | None:
        kept = (BLOCKS - recomputed) * block + recomputed * inputs
        peak = resident + work + max(kept, recomputed * inputs + block)
        return Trial(resident, kept, peak) if peak <= memory else None

    return trial


@given(
    block=st.integers(50, 400),
    inputs=st.integers(1, 40),
    work=st.integers(0, 500),
    added=st.integers(0, 300),
    limit=st.integers(900, 6000),
    slack=st.integers(-500, 500),
)
def test_the_choice_is_the_best_that_fits(
    block: int, inputs: int, work: int, added: int, limit: int, slack: int
) -> None:
    trial = simulated(1000, block, inputs, work, limit + slack)
    plan = choose(BLOCKS, trial, lambda: limit, added, agree=lambda value: value)
    if plan is None:
        assert trial(BLOCKS) is None
        return
    assert trial(plan.checkpointed_blocks) == plan.trial and plan.trial is not None
    if plan.checkpointed_blocks < BLOCKS - 1:
        assert plan.predicted is not None and plan.predicted <= limit
    if 0 < plan.checkpointed_blocks < BLOCKS:
        next_one = trial(plan.checkpointed_blocks - 1)
        assert next_one is None or next_one.peak + added > limit or plan.notes or plan.checkpointed_blocks == BLOCKS - 1


def test_what_runs_out_of_memory_is_told_and_recomputed() -> None:
    blocks_that_fit = 2
    trial = simulated(1000, 100, 10, 0, 1000 + blocks_that_fit * 100 + (BLOCKS - blocks_that_fit) * 10)
    plan = choose(BLOCKS, trial, lambda: 10_000, 0, agree=lambda value: value)  # the limit promises too much
    assert plan is not None and plan.checkpointed_blocks == BLOCKS - 1 and plan.trial is not None
    fits_three = simulated(1000, 100, 10, 0, 1000 + 4 * 100 + 2 * 10)
    plan = choose(BLOCKS, fits_three, lambda: 10_000, 0, agree=lambda value: value)
    assert plan is not None and plan.checkpointed_blocks == 2
    assert plan.lines()[0] == "a trial step with 0 of 6 blocks recomputed ran out of memory: recomputing more"


def test_all_ranks_follow_the_one_with_least_memory() -> None:
    trial = simulated(1000, 100, 10, 0, 10_000)
    asked: list[int] = []

    def agree(value: int) -> int:
        asked.append(value)
        return max(value, 4) if len(asked) == 3 else value  # the third question is how many blocks to recompute

    plan = choose(BLOCKS, trial, lambda: 10_000, 0, agree)
    assert plan is not None and plan.checkpointed_blocks == 4 and asked[:3] == [0, 0, 0]

    def other_fails(value: int) -> int:
        return 1

    assert choose(BLOCKS, trial, lambda: 10_000, 0, other_fails) is None


def test_policies_on_the_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    module = make_module()

    def plan(policy: int | str) -> CheckpointingPlan:
        chosen = plan_checkpointing(policy, module, SHAPE, 0, CPU)
        assert module.transformer.checkpointed_blocks == chosen.checkpointed_blocks
        return chosen

    assert [plan(policy).checkpointed_blocks for policy in ("none", "full", 2, "auto")] == [0, BLOCKS, 2, 0]
    assert plan("none").predicted is None and plan("none").lines() == ["recomputing 0 of 6 blocks"]

    kept = {}
    for recomputed in range(BLOCKS + 1):
        set_checkpointed_blocks(module.transformer, recomputed)
        trial = try_step(module, random_arguments(SHAPE, 24, CPU))
        assert trial is not None
        kept[recomputed] = trial.kept
    for recomputed in range(1, BLOCKS):
        monkeypatch.setattr(checkpointing, "usable_bytes", lambda device, fits=kept[recomputed]: fits + 10)
        chosen = plan("auto")
        assert chosen.checkpointed_blocks == recomputed and chosen.predicted == kept[recomputed]

    monkeypatch.setattr(checkpointing, "try_step", lambda *_: None)
    message = r"even with every block recomputed, a step of 2 × 96×64 pixels with 12 text tokens runs out of memory"
    with pytest.raises(ValueError, match=message):
        plan("auto")


def test_the_plan_adds_up() -> None:
    plan = CheckpointingPlan(12, 60, Trial(25 * GIB, 40 * GIB, 67 * GIB), GIB // 2, 76 * GIB)
    assert plan.lines() == [
        "recomputing 12 of 60 blocks: 67.50 GiB predicted, 76.00 may be used (resident 25.00 + activations 40.00 + "
        "work 2.00 + optimizer and gradients 0.50)"
    ]


def test_the_real_peak_is_told_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda device: 51 * GIB)
    plan, said = CheckpointingPlan(0, 6, Trial(0, 0, 50 * GIB), 0, 76 * GIB), []
    for batches, line in ((5, "peak memory 51.00 GiB, predicted 50.00 (+2.0%)"), (2, None)):
        said = []
        watch = PeakWatch(plan, SHAPE, torch.device("cuda"), said.append)
        latents, _, _, prompt = random_arguments(SHAPE, 24, CPU)
        for _ in range(batches):
            watch.saw(latents, prompt)
        assert said == ([line] if line else [])
    watch = PeakWatch(plan, SHAPE, torch.device("cuda"), said.append)
    watch.saw(latents[:1], prompt)
    watch.tell()
    watch.tell()
    assert said == ["peak memory 51.00 GiB, predicted 50.00 (+2.0%, its largest batch had 36 of 72 tokens)"]


def dataset(encoded: bool, training: list[int] | None = None) -> Any:
    buckets = [SimpleNamespace(id=id, width=width, height=64, sources=()) for id, width in enumerate((64, 96))]
    tokens = np.array([30, 90, 20, 50])
    index = SimpleNamespace(
        bucket=np.array([0, 0, 1, 1]),
        prompt_tokens=tokens,
        caption_length=tokens,
        picture_tokens=0 * tokens,
        longest_caption=0 * tokens,
        variant_tokens=np.zeros((4, 0), np.int32),
    )
    chosen = np.arange(4) if training is None else np.array(training, dtype=np.int64)
    manifest = SimpleNamespace(buckets=buckets)
    return SimpleNamespace(manifest=manifest, index=index, encoded=encoded, training=chosen)


def stream() -> Any:
    return SimpleNamespace(**vars(dataset(True, [])) | {"index": None})


@pytest.mark.parametrize(
    "options,data,expected",
    [
        ({}, dataset(True), BatchShape(1, 64, 64, 90, False)),  # 16 + 90 tokens against 24 + 50
        ({}, dataset(True, [0, 2, 3]), BatchShape(1, 64, 96, 50, False)),  # 90 is held out
        ({}, dataset(True, [0]), BatchShape(1, 64, 64, 30, False)),
        ({"text_padding": 32}, dataset(True), BatchShape(1, 64, 64, 96, True)),
        ({"max_prompt_tokens": 40, "batch_size": 4}, dataset(True), BatchShape(4, 64, 96, 40, True)),
        ({}, dataset(False), BatchShape(1, 64, 96, 512, False)),  # lengths are not known
        ({}, stream(), BatchShape(1, 64, 96, 512, False)),
    ],
)
def test_the_largest_batch_occurs(options: dict[str, int], data: Any, expected: BatchShape) -> None:
    text_padding = options.pop("text_padding", 1)
    assert largest_batch(BatchOptions(**options), data, text_padding) == expected
