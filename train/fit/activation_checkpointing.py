"""Activation checkpointing (arXiv:1604.06174): how many blocks recompute their activations in the backward pass.

Decided before step 0 by trial steps of the largest batch:

    plan = plan_checkpointing(config.activation_checkpointing, module, data.largest, added, device)
    for line in plan.lines(): print(line)

A trial step is a forward and backward pass on random data without an update; its gradients are dropped. Two of them tell
what one block keeps, so the peak for any number of recomputed blocks follows; a third confirms the choice. What runs
out of memory does so here, where recomputing more blocks is still possible and no rank waits for another.
"""

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Literal

import torch
import torch.distributed as dist

from qwen_image.float8.linear import keep_transposed
from qwen_image.free_memory import GIB, allocator_bytes, device_bytes, host_bytes, restart_peak
from qwen_image.model.conditioning import Prompt
from qwen_image.model.transformer import QwenImageTransformer
from train.fit.trial_step import Trial, try_step
from train.loader.batch_shapes import BatchShape, random_arguments
from train.process import start_clock
from train.process.ranks import ranks_here
from train.step.flow_matching_module import FlowMatchingModule

# Left free: fragments (batches of other shapes need pieces of other sizes), and what NCCL and libraries still load outside
# torch's allocator.
MARGIN_BYTES, MARGIN_SHARE = 1 * GIB, 0.04
SMALL_MARGIN_SHARE = 0.1  # on a card on which that gigabyte would be much
FURTHER_TRIALS = 6
REPORTED_AFTER = 3  # batches of the largest shape


Policy = int | Literal["none", "full", "auto"]


def checkpointed_blocks(policy: Policy, blocks: int) -> int:
    """How many of the model's blocks `--activation_checkpointing` asks for; for auto the most there can be.

    Raises ValueError for more than the model has.
    """
    if isinstance(policy, str):
        return 0 if policy == "none" else blocks
    if policy > blocks:
        raise ValueError(f"activation_checkpointing: {policy} blocks to recompute, but the model has {blocks}")
    return policy


@dataclass(frozen=True)
class CheckpointingPlan:
    """The choice and why: `predicted` = the trial's parts + `added`, beside `limit`. Bytes; None: nothing was tried.

    The leading `checkpointed_blocks` of `blocks` keep nothing but their input.
    """

    checkpointed_blocks: int
    blocks: int
    trial: Trial | None = None
    added: int = 0
    limit: int | None = None
    notes: tuple[str, ...] = ()

    @property
    def predicted(self) -> int | None:
        """Peak of training, as torch.cuda.max_memory_allocated will count it."""
        return None if self.trial is None else self.trial.peak + self.added

    def lines(self) -> list[str]:
        """For people: what led to the choice, then the choice."""
        line = f"recomputing {self.checkpointed_blocks} of {self.blocks} blocks"
        if self.trial is not None and self.limit is not None and self.predicted is not None:
            resident, kept, peak = self.trial
            line += (
                f": {self.predicted / GIB:.2f} GiB predicted, {self.limit / GIB:.2f} may be used "
                f"(resident {resident / GIB:.2f} + activations {kept / GIB:.2f} + work {(peak - resident - kept) / GIB:.2f}"
                f" + optimizer and gradients {self.added / GIB:.2f})"
            )
        return [*self.notes, line]


def usable_bytes(device: torch.device) -> int:
    """What this process may have in all: its own and the free memory, less the margin; on the CPU its share of the host's."""
    if device.type != "cuda":
        return int(host_bytes() / ranks_here() * (1 - MARGIN_SHARE))
    index = torch.cuda.current_device() if device.index is None else device.index
    free, _ = torch.cuda.mem_get_info(index)
    total = device_bytes(device)
    return min(free + torch.cuda.memory_reserved(index), allocator_bytes(device)) - margin(total)


def margin(total: int) -> int:
    """Of a card of `total` bytes, what is left free."""
    return max(int(min(MARGIN_BYTES, SMALL_MARGIN_SHARE * total)), int(total * MARGIN_SHARE))


def largest_over_ranks(device: torch.device, value: int) -> int:
    """The largest of all ranks' values; a collective, if there is a process group."""
    if not dist.is_initialized():
        return value
    tensor = torch.tensor(value, dtype=torch.int64, device=device)
    dist.all_reduce(tensor, dist.ReduceOp.MAX)
    return int(tensor.item())


def choose(
    blocks: int,
    trial: Callable[[int], Trial | None],
    usable: Callable[[], int],
    added: int,
    agree: Callable[[int], int],
) -> CheckpointingPlan | None:
    """As few recomputed blocks as fit; None when none of the ways fits. Every rank comes to the same number.

    Args:
        trial: a trial step with so many leading blocks recomputed.
        usable: bytes that this rank may use, asked for after the first trial, which loads kernels.
        added: bytes that training will hold besides what a trial sees.
        agree: the largest of all ranks' values.

    The peak is linear in the number of kept blocks from a few on: it comes at the start of the backward pass. (With one or
    none it comes when a block is recomputed; so keeping the last block costs nothing.)
    """

    def attempt(checkpointed: int) -> Trial | None:
        result = trial(checkpointed)
        return None if agree(int(result is None)) else result

    least, few = min(1, blocks), min(3, blocks)
    chosen = blocks - least
    small = attempt(chosen)
    if small is None and least:
        chosen = blocks
        small = attempt(chosen)
    if small is None:
        return None
    limit = usable()
    best = CheckpointingPlan(chosen, blocks, small, added, limit)
    more = attempt(blocks - few) if few > least else small
    if more is None or chosen == blocks:
        return best
    held = more.resident + more.kept - small.resident - small.kept
    a_block = max(1, held // max(1, few - least))
    fits = few + (limit - added - more.peak) // a_block
    wanted = agree(blocks - min(blocks, max(least, fits)))
    notes: list[str] = []
    for _ in range(FURTHER_TRIALS):
        if wanted >= chosen:
            break
        result = more if wanted == blocks - few else attempt(wanted)
        excess = 0 if result is None else result.peak + added - limit
        step = agree(max(1, blocks // 10) if result is None else max(0, math.ceil(excess / a_block)))
        if step == 0:
            assert result is not None
            return CheckpointingPlan(wanted, blocks, result, added, limit, tuple(notes))
        why = "ran out of memory" if result is None else f"took {excess / GIB:.2f} GiB more than may be used"
        notes.append(f"a trial step with {wanted} of {blocks} blocks recomputed {why}: recomputing more")
        wanted = min(chosen, wanted + step)
    return CheckpointingPlan(chosen, blocks, small, added, limit, tuple(notes))


def set_checkpointed_blocks(transformer: QwenImageTransformer, blocks: int) -> None:
    """Recompute so many leading blocks; float8 weights lie in both layouts in the others alone."""
    transformer.checkpointed_blocks = blocks
    keep_transposed(transformer, blocks)


def plan_checkpointing(
    policy: Policy,
    module: FlowMatchingModule,
    shape: BatchShape,
    added: int,
    device: torch.device,
    instead: Callable[[], str] | None = None,
) -> CheckpointingPlan:
    """Checkpoint blocks of `module.transformer` by the policy none | full | auto | a number; what was chosen and why.

    Call it when weights, LoRA and optimizer are in place. `added`: bytes that training will hold besides (engine_bytes);
    `instead`: what to do when even recomputing every block doesn't help.

    auto on the CPU counts what autograd keeps against the host's free memory. On a GPU the other policies are tried
    too. Raises ValueError when what was asked for runs out of memory, or nothing fits.
    """
    agree = partial(largest_over_ranks, device)
    transformer = module.transformer
    blocks = transformer.config.num_layers
    asked = checkpointed_blocks(policy, blocks)
    if device.type != "cuda" and policy != "auto":
        set_checkpointed_blocks(transformer, asked)
        return CheckpointingPlan(asked, blocks)
    arguments = random_arguments(shape, transformer.config.joint_attention_dim, device)

    def trial(checkpointed: int) -> Trial | None:
        return try_step(module, arguments, partial(set_checkpointed_blocks, transformer, checkpointed))

    if device.type == "cuda":
        trial(asked)  # compiles; what that needs doesn't count
        start_clock.reached("compiling")
    if policy == "auto":
        plan = choose(blocks, trial, partial(usable_bytes, device), added, agree)
    else:
        result = trial(asked)
        failed = agree(int(result is None))
        plan = None if failed else CheckpointingPlan(asked, blocks, result, added, usable_bytes(device))
    if plan is None:
        raise ValueError(_out_of_memory(policy, asked, blocks, shape, device, instead))
    set_checkpointed_blocks(transformer, plan.checkpointed_blocks)
    if device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)
    return plan


def _out_of_memory(
    policy: Policy,
    checkpointed: int,
    blocks: int,
    shape: BatchShape,
    device: torch.device,
    instead: Callable[[], str] | None,
) -> str:
    asked = f"activation_checkpointing {policy}: {checkpointed} of {blocks} blocks recomputed"
    if policy == "auto":
        asked = "activation_checkpointing auto: even with every block recomputed"
    if device.type == "cuda":
        resident, usable = torch.cuda.memory_allocated(device) / GIB, usable_bytes(device) / GIB
        room = f"{resident:.2f} GiB are taken before a step, {usable:.2f} may be used"
    else:
        room = f"{usable_bytes(device) / GIB:.2f} GiB of host memory may be used"
    if policy not in ("auto", "full"):
        todo = "say auto or a larger number"
    elif instead is not None:
        todo = instead()
    else:
        todo = "use a smaller --batch_size or pictures, or --offload_activations true"
    return (
        f"{asked}, a step of {shape.batch} × {shape.height}×{shape.width} pixels with {shape.text} text tokens"
        f"{f' and {len(shape.sources)} source images' if shape.sources else ''} runs out of memory ({room}): {todo}"
    )


class PeakWatch:
    """Puts the real peak of a GPU's memory beside the predicted one, once the largest shape was trained a few times."""

    def __init__(
        self, plan: CheckpointingPlan, shape: BatchShape, device: torch.device, say: Callable[[str], None] = print
    ) -> None:
        self.plan, self.tokens, self.device, self.say = plan, shape.tokens, device, say
        self.seen = self.largest = 0
        self.told = plan.predicted is None or device.type != "cuda"
        self.before = 0

    def saw(self, latents: torch.Tensor, prompt: Prompt) -> None:
        """Call it after a micro-batch of latents [B, 16, 1, H/8, W/8]. Waits for nothing."""
        grids = prompt.grids(latents.shape[-2] // 2, latents.shape[-1] // 2)
        tokens = len(latents) * (sum(rows * columns for rows, columns in grids) + prompt.embeds.shape[1])
        self.largest = max(self.largest, tokens)
        self.seen += tokens >= self.tokens
        if self.seen == REPORTED_AFTER:
            self.tell()

    @contextmanager
    def apart(self) -> Iterator[None]:
        """What happens inside is no training: the memory that it takes doesn't count."""
        if self.device.type == "cuda":
            self.before = max(self.before, torch.cuda.max_memory_allocated(self.device))
        try:
            yield
        finally:
            restart_peak(self.device)

    def tell(self) -> None:
        """The comparison, if it was not told yet: for the end of a run that met few of the largest batches."""
        if self.told or not self.largest:
            return
        self.told = True
        assert self.plan.predicted is not None
        peak = max(self.before, torch.cuda.max_memory_allocated(self.device))
        batches = "" if self.seen else f", its largest batch had {self.largest} of {self.tokens} tokens"
        self.say(
            f"peak memory {peak / GIB:.2f} GiB, predicted {self.plan.predicted / GIB:.2f} "
            f"({peak / self.plan.predicted - 1:+.1%}{batches})"
        )
