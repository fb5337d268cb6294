"""The model with the moving average in the place of its weights, for validation and sample images."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist

from train.engine.ema import EMA
from train.engine.optimizer_state import fragments, held, trainable_parameters, trainable_shapes


@contextmanager
def averaged_weights(engine: Any) -> Iterator[None]:
    """Inside, the model of a ZeRO-2 engine computes with the averages, rounded to its weights' type. A collective.

    Takes memory for the weights once more, and for float32 ones besides while it begins; then every bit is as before.
    """
    parameters = list(trainable_parameters(engine).values())
    assert not any(hasattr(parameter, "ds_id") for parameter in parameters), "the weights must be whole on every rank"
    with torch.no_grad():
        before = [parameter.detach().clone() for parameter in parameters]
        for parameter, average in zip(parameters, whole_averages(engine), strict=True):
            parameter.data.copy_(average)
    try:
        yield
    finally:
        for parameter, own in zip(parameters, before, strict=True):
            parameter.data.copy_(own)


def whole_averages(engine: Any) -> list[torch.Tensor]:
    """The averages of all trained weights, float32 on the device, on every rank; a collective."""
    sizes = {name: torch.Size(shape) for name, shape in trainable_shapes(engine).items()}
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
