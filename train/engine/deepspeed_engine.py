"""The DeepSpeed engine: process group, device, optimizer, initialisation, and reading LoRA weights back whole."""

import math
import os
import warnings
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from train.config.train_config import TrainConfig
from train.engine.optimizer_state import WEIGHT, gather, trainable_shapes
from train.engine.zero2_step import can_judge_on_device, judge_on_device, lighten
from train.step.flat_parameter import link
from train.step.flow_matching_module import FlowMatchingModule

PARTITIONED = 3  # the ZeRO stage that spreads frozen weights over the ranks
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


@dataclass(frozen=True)
class Ranks:
    """This process among all: filled from the launcher's environment (deepspeed, torchrun, srun), or a world of one."""

    rank: int
    world: int
    local_rank: int
    device: torch.device

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    def say(self, text: str) -> None:
        """A line on standard output, from rank 0 alone; a full disk behind it doesn't end the run."""
        if self.is_main:
            with suppress(OSError):
                print(text, flush=True)


def join_process_group() -> Ranks:
    """Initialise torch.distributed (NCCL on CUDA, gloo else) and choose this process's device."""
    import deepspeed

    # torch 2.13 renamed collectives that DeepSpeed 0.19 calls, and says so at every step.
    warnings.filterwarnings("ignore", r"`torch\.distributed\.\w+` is deprecated", FutureWarning)
    for name, default in (("RANK", "0"), ("WORLD_SIZE", "1"), ("LOCAL_RANK", "0"), ("MASTER_ADDR", "127.0.0.1")):
        os.environ.setdefault(name, default)
    if os.environ["WORLD_SIZE"] == "1":
        os.environ.setdefault("MASTER_PORT", "0")  # nobody else has to find it
    local_rank = int(os.environ["LOCAL_RANK"])
    if torch.cuda.is_available():
        device = torch.device("cuda", local_rank % torch.cuda.device_count())
        torch.cuda.set_device(device)
    else:
        device = torch.device("cpu")
        # DeepSpeed would compile C++ for a minute or three to add up CPU ranks a little faster than gloo does.
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    deepspeed.init_distributed(
        dist_backend="nccl" if device.type == "cuda" else "gloo", auto_mpi_discovery=False, verbose=False
    )
    return Ranks(dist.get_rank(), dist.get_world_size(), local_rank, device)


def leave_process_group() -> None:
    """At the very end, so that nothing warns at exit; DeepSpeed can't join a second group in one process."""
    if dist.is_initialized():
        dist.destroy_process_group()


def learning_rate(step: int, config: TrainConfig, total_steps: int) -> float:
    """Learning rate of optimizer step `step` (from 0): linear warm-up, then constant, cosine or linear to 0.

    A pure function of the step, so that resuming needs no scheduler state.
    """
    if step < config.lr_warmup_steps:
        return config.learning_rate * (step + 1) / config.lr_warmup_steps
    if config.lr_scheduler == "constant":
        return config.learning_rate
    done = (step - config.lr_warmup_steps) / max(1, total_steps - config.lr_warmup_steps)
    remaining = 1 - done if config.lr_scheduler == "linear" else 0.5 * (1 + math.cos(math.pi * done))
    return config.learning_rate * max(0.0, remaining)


def initialize(module: nn.Module, config: TrainConfig, deepspeed_config: dict[str, Any]) -> Any:
    """Wrap `module` into a DeepSpeed engine that trains its parameters with requires_grad; returns the engine.

    The optimizer is torch's AdamW: DeepSpeed's own would compile C++ or CUDA at start. Under ZeRO-2 it gets the trained
    weights of a FlowMatchingModule as one flat parameter.
    """
    import deepspeed

    together = None
    if isinstance(module, FlowMatchingModule) and deepspeed_config["zero_optimization"]["stage"] < PARTITIONED:
        together = module
    parameters = [together.use_flat()] if together else [p for p in module.parameters() if p.requires_grad]
    offloaded = "offload_optimizer" in deepspeed_config["zero_optimization"]
    optimizer = torch.optim.AdamW(
        parameters,
        lr=config.learning_rate,
        betas=(config.adam_beta1, config.adam_beta2),
        eps=config.adam_epsilon,
        weight_decay=config.weight_decay,
        fused=parameters[0].is_cuda and not offloaded,
    )
    engine, *_ = deepspeed.initialize(
        model=module,
        optimizer=optimizer,
        model_parameters=parameters,
        config=deepspeed_config,
        dist_init_required=False,
    )
    if together is not None:
        link(together.matrices(), parameters[0])
    if engine.zero_optimization_stage() == 2 and not offloaded:
        lighten(engine.optimizer)
        if can_judge_on_device(engine.optimizer):
            judge_on_device(engine.optimizer)
    return engine


def set_learning_rate(engine: Any, learning_rate: float) -> None:
    for group in engine.optimizer.param_groups:
        group["lr"] = learning_rate


def whole_weights(engine: Any) -> dict[str, torch.Tensor]:
    """float32 master weights of the trainable parameters by their name in the module: on the CPU of rank 0, {} elsewhere.

    A collective over these parameters alone; nothing frozen moves.
    """
    (flat,) = gather(engine, [WEIGHT])
    if flat is None:
        return {}
    shapes = trainable_shapes(engine)
    parts = flat.split([math.prod(shape) for shape in shapes.values()])
    return {name: part.view(shape) for (name, shape), part in zip(shapes.items(), parts, strict=True)}
