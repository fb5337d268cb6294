"""Whether a run replays CUDA graphs: before step 0, the largest batch is timed in both ways.

Capturing takes as long as a few steps, for each shape of a batch. A large batch that the host launches nearly as fast as
the GPU works gains 2 % by it, a small one half: a short run over many shapes would lose time. The largest batch gains
least, so what it decides holds for all.
"""

import time
from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import torch

from qwen_image.free_memory import GIB, allocator_bytes
from train.fit.activation_checkpointing import largest_over_ranks
from train.fit.trial_step import try_step
from train.loader.batch_shapes import KEPT, BatchShape, random_arguments
from train.step.flow_matching_module import FlowMatchingModule

UNUSED = "CUDA graphs are not used: "


class StepTimes(NamedTuple):
    """Seconds of a forward and backward pass launched kernel by kernel and replayed, and of capturing its graphs."""

    launched: float
    replayed: float
    capture: float

    def __str__(self) -> str:
        return (
            f"{self.replayed:.3f} s instead of {self.launched:.3f} for the largest, {self.capture:.1f} s to capture it"
        )

    def pay(self, shapes: int, batches: int) -> bool:
        """Whether so many batches win back the capturing of so many shapes."""
        return batches * (self.launched - self.replayed) > shapes * self.capture


Policy = Literal["auto", "on", "off"]


def start_graphs(
    policy: Policy,
    module: FlowMatchingModule,
    largest: BatchShape,
    shapes: int,
    batches: int,
    device: torch.device,
    to_come: int = 0,
) -> list[str]:
    """Let `module` replay CUDA graphs where it can and where that pays; lines that tell. A collective.

    `shapes`: how many a batch can have; `batches`: micro-batches that this rank still trains; `to_come`: bytes that training
    will allocate. The graphs of the largest batch are captured here, so that their memory then serves all others. Call it
    when nothing about the step changes any more.
    """
    if policy == "off" or device.type != "cuda":
        return []
    asked = policy == "on"
    if shapes > KEPT and not asked:
        return [f"{UNUSED}a batch has one of up to {shapes} shapes, and no more than {KEPT} are kept"]
    arguments = random_arguments(largest, module.transformer.config.joint_attention_dim, device)
    line, failed = f"CUDA graphs: captured once for each of up to {shapes} shapes of batches", ""
    launched = 0.0 if asked else seconds(lambda: try_step(module, arguments, fetching=True))
    torch.cuda.empty_cache()
    module.use_graphs(always_masked=largest.padded)
    try:
        capture = seconds(lambda: replay(module, arguments), times=1)
        if not asked:
            times = StepTimes(launched, seconds(lambda: replay(module, arguments)), capture)
            line += f"; {times}"
            if not times.pay(shapes, batches):
                failed = f"{UNUSED}{batches} batches don't win back the capturing of up to {shapes} shapes ({times})"
        torch.cuda.empty_cache()
        lacking = torch.cuda.memory_reserved(device) + to_come - allocator_bytes(device)
        if lacking > 0 and not failed:
            failed = f"{UNUSED}with them {lacking / GIB:.2f} GiB would be lacking for gradients and optimizer"
    except RuntimeError as error:
        reason = str(error).strip().split("\n")[0]
        failed = f"warning: CUDA graphs could not be captured, kernels are launched one by one: {reason}"
    if largest_over_ranks(device, int(bool(failed))):
        module.graphs = None
        torch.cuda.empty_cache()
        return [failed or f"{UNUSED}another rank can't, or gains nothing"]
    return [line]


def seconds(work: Callable[[], object], times: int = 3) -> float:
    """The shortest of so many runs, to the end of the device's work."""
    taken = []
    for _ in range(times):
        torch.cuda.synchronize()
        start = time.perf_counter()
        work()
        torch.cuda.synchronize()
        taken.append(time.perf_counter() - start)
    return min(taken)


def replay(module: FlowMatchingModule, arguments: tuple[Any, ...]) -> None:
    """Forward and backward pass by the module's graphs; nobody keeps the gradients."""
    receivers = module.matrices() if module.flat is None else [module.flat]
    with torch.enable_grad():
        torch.autograd.grad(module(*arguments).sum(), receivers)
