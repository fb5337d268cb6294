"""The DeepSpeed engine: process group, device, optimizer, initialisation, and reading LoRA weights back whole."""

import math
from typing import Any

import torch
from torch import nn

from train.config.deepspeed_json import PARTITIONED
from train.config.train_config import TrainConfig
from train.engine.optimizer_state import WEIGHT, gather, trainable_shapes
from train.engine.zero2_step import can_judge_on_device, judge_on_device, lighten
from train.step.flat_parameter import link
from train.step.flow_matching_module import FlowMatchingModule


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
