"""The model with an average in the place of its weights, for validation and sample images: the moving one, or the one that
schedule-free's optimizer trains towards."""

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
import torch.distributed as dist

from train.engine.ema import EMA
from train.engine.optimizer_state import (
    WEIGHT,
    fragments,
    held,
    lora_kind,
    trainable_parameters,
    trainable_shapes,
    whole_of,
)


@contextmanager
def averaged_weights(engine: Any, kind: str = EMA) -> Iterator[None]:
    """Inside, the model of a ZeRO-2 engine computes with the averages, rounded to its weights' type. A collective (for EMA).

    Takes memory for the weights once more, and for float32 ones besides while it begins; then every bit is as before.
    """
    parameters = list(trainable_parameters(engine).values())
    assert not any(hasattr(parameter, "ds_id") for parameter in parameters), "the weights must be whole on every rank"
    with torch.no_grad():
        before = [parameter.detach().clone() for parameter in parameters]
        for parameter, average in zip(parameters, whole_averages(engine, kind), strict=True):
            parameter.data.copy_(average)
    try:
        yield
    finally:
        for parameter, own in zip(parameters, before, strict=True):
            parameter.data.copy_(own)


def lora_weights(engine: Any) -> AbstractContextManager[None]:
    """Inside, the model computes with what the run's LoRA file would hold: its weights, under schedule-free their average."""
    kind = lora_kind(engine)
    return nullcontext() if kind == WEIGHT else averaged_weights(engine, kind)


def whole_averages(engine: Any, kind: str = EMA) -> list[torch.Tensor]:
    """The averages of all trained weights, float32 on the device, on every rank; a collective for EMA."""
    sizes = {name: torch.Size(shape) for name, shape in trainable_shapes(engine).items()}
    if kind != EMA:
        optimizer = whole_of(engine)
        average = None if optimizer is None else optimizer.averages()
        assert optimizer is not None and average is not None, f"this engine has no {kind}"
        parts = optimizer.split(average.to(engine.device))
        return [part.view(size) for part, size in zip(parts, sizes.values(), strict=True)]
    first, total = {}, 0
    for name, size in sizes.items():
        first[name] = total
        total += size.numel()
    whole = torch.zeros(total, device=engine.device)
    for fragment in fragments(engine):
        place = whole[first[fragment.name] + fragment.start :][: fragment.numel]
        place.copy_(fragment.of(held(engine, fragment.flat, EMA)))
    dist.all_reduce(whole.view(torch.int32))  # every element is one rank's, and 0 plus its bits are its bits
    parts = whole.split([size.numel() for size in sizes.values()])
    return [part.view(size) for part, size in zip(parts, sizes.values(), strict=True)]
