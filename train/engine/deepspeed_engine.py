"""The DeepSpeed engine: process group, device, optimizer, initialization, and reading LoRA weights back whole."""

import math
from typing import Any

import torch
from torch import nn

from train.config.zero_plan import ZeroPlan
from train.engine.ema import Ema
from train.engine.optimizer import Optimizer
from train.engine.optimizer_state import WEIGHT, flat_masters, gather, trainable_shapes
from train.engine.whole_optimizer import WholeOptimizer
from train.engine.zero2_step import can_judge_on_device, judge_on_device, lighten
from train.process import start_clock
from train.step.flat_parameter import link
from train.step.flow_matching_module import FlowMatchingModule


def initialize(module: nn.Module, optimizer: Optimizer, zero: ZeroPlan, ema_decay: float | None = None) -> Any:
    """Wrap `module` into a DeepSpeed engine that trains its parameters with requires_grad; returns the engine.

    The engine runs stage 2: what is trained is small, and where the frozen weights lie is not its matter. Its optimizer gets
    the trained weights of a FlowMatchingModule as one flat parameter. With `ema_decay` it gets an attribute `ema` (an Ema),
    which whoever steps updates.
    """
    import deepspeed

    together = None
    if isinstance(module, FlowMatchingModule):
        together = module
    shapes = {name: parameter.shape for name, parameter in module.named_parameters() if parameter.requires_grad}
    parameters = [together.use_flat()] if together else [p for p in module.parameters() if p.requires_grad]
    settings, client = zero.engine_settings, None
    if optimizer.whole:
        assert together is not None, "whole matrices are those of a FlowMatchingModule"
        names = {name.replace("_orig_mod.", ""): shape for name, shape in shapes.items()}
        client = WholeOptimizer(parameters[0], names, optimizer, zero.offload_optimizer)
        settings = settings | {"zero_allow_untested_optimizer": True}
    engine, *_ = deepspeed.initialize(
        model=module,
        optimizer=client or optimizer.build(parameters, zero.offload_optimizer),
        model_parameters=parameters,
        config=settings,
        dist_init_required=False,
    )
    if together is not None:
        link(together.matrices(), parameters[0])
    if not zero.offload_optimizer:
        lighten(engine.optimizer)
        if can_judge_on_device(engine.optimizer):
            judge_on_device(engine.optimizer)
    if ema_decay is not None:
        engine.ema = Ema(flat_masters(engine), ema_decay)
    start_clock.reached("engine")
    return engine


def whole_weights(engine: Any, kind: str = WEIGHT) -> dict[str, torch.Tensor]:
    """float32 master weights of the trainable parameters by their name in the module: on the CPU of rank 0, {} elsewhere.

    With the kind EMA their moving averages. A collective over these parameters alone; nothing frozen moves.
    """
    (flat,) = gather(engine, [kind])
    if flat is None:
        return {}
    shapes = trainable_shapes(engine)
    parts = flat.split([math.prod(shape) for shape in shapes.values()])
    return {name: part.view(shape) for (name, shape), part in zip(shapes.items(), parts, strict=True)}
