"""Before step 0: as few blocks checkpointed as fit, and CUDA graphs where they pay. What is found by trial is told."""

from collections.abc import Callable
from dataclasses import dataclass

import torch

from train.config.train_config import TrainConfig
from train.fit.activation_checkpointing import CheckpointingPlan, PeakWatch, plan_checkpointing
from train.fit.cheapest_change import advice
from train.fit.cuda_graphs_choice import Policy, start_graphs
from train.fit.memory_plan import Machine, Setup, engine_bytes, graphs_bytes, plan_memory
from train.loader.batch_shapes import BatchShape
from train.loader.from_config import RunData
from train.process import start_clock
from train.step.flow_matching_module import FlowMatchingModule

PROVEN_SHARE = 0.9  # of a plan that proved too small, what another one may take


@dataclass(frozen=True)
class Fit:
    """How the step was made to fit, for the largest batch on this device, and lines that tell of it."""

    checkpointing: CheckpointingPlan
    largest: BatchShape
    device: torch.device
    lines: list[str]

    def peak_watch(self, say: Callable[[str], None]) -> PeakWatch:
        """Will tell the real peak beside the predicted one."""
        return PeakWatch(self.checkpointing, self.largest, self.device, say)


def fit_step(
    config: TrainConfig, setup: Setup, module: FlowMatchingModule, data: RunData, steps_done: int, device: torch.device
) -> Fit:
    """Decide about the step of `module`, whose weights, LoRA and optimizer are in place. A collective.

    Raises ValueError when what was asked for doesn't fit.
    """
    start_clock.reached("resuming")
    zero, accumulation = setup.zero, data.reading.accumulation
    sizes = zero, setup.trainable, setup.lora_dtype, setup.world, accumulation
    added = engine_bytes(*sizes, resumed=steps_done > 0, optimizer=setup.optimizer)
    with_graphs = added + (graphs_bytes(setup) if graphs_policy(config) != "off" else 0)
    policy = config.activation_checkpointing

    def instead() -> str:  # the plan said that it fits; the trial knows better
        machine = Machine.of(device)
        return advice(setup, machine, below=int(plan_memory(setup, machine).bytes * PROVEN_SHARE))

    checkpointing = plan_checkpointing(policy, module, data.largest, with_graphs, device, instead)
    start_clock.reached("trial steps")
    batches = (data.steps - steps_done) * accumulation
    to_come = added + setup.trainable * (setup.lora_dtype.itemsize + 4)  # gradients, and the same in float32
    to_come += setup.optimizer.step_bytes(setup.trainable)
    graphs = start_graphs(graphs_policy(config), module, data.largest, data.shapes, batches, device, to_come)
    start_clock.reached("graphs")
    return Fit(checkpointing, data.largest, device, [*checkpointing.lines(), *graphs])


def graphs_policy(config: TrainConfig) -> Policy:
    """`--cuda_graphs`, but off where the host has work to do within a step, and not left to the clock if deterministic."""
    if config.lora_dropout > 0 or config.offload_activations:
        return "off"
    return "on" if config.deterministic and config.cuda_graphs == "auto" else config.cuda_graphs
