"""A LoRA in training at another strength, or switched off, for a while: by its own weights, which kernels and graphs read."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn

from train.lora.dora import magnitude
from train.lora.inject import lora_parameters
from train.lora.targets import base_layer


@contextmanager
def lora_at(transformer: nn.Module, strength: float) -> Iterator[None]:
    """Inside, the LoRA's update is multiplied with `strength`; 0 gives the base. Afterwards every bit is as before.

    lora_B is multiplied, as PEFT multiplies its scale. At 0 a DoRA's magnitudes become the lengths of the base's rows.
    """
    touched: dict[nn.Parameter, torch.Tensor] = {}
    if strength != 1:
        for name, parameter in lora_parameters(transformer).items():
            layer, _, kind = name.rpartition(".")
            if kind == "lora_B":
                touched[parameter] = parameter.detach() * strength
            elif kind == "lora_magnitude_vector" and strength == 0:
                weight = base_layer(transformer, layer).weight
                none = torch.zeros(1, weight.shape[1]), torch.zeros(weight.shape[0], 1)
                touched[parameter] = magnitude(weight, *none)
    before = {parameter: parameter.detach().clone() for parameter in touched}
    for parameter, values in touched.items():
        parameter.data.copy_(values)
    try:
        yield
    finally:
        for parameter, values in before.items():
            parameter.data.copy_(values)
