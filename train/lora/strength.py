"""A LoRA in training at another strength, or switched off, for a while: by its own weights, which kernels and graphs read."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn

from train.lora.dora import magnitude
from train.lora.inject import lora_parameters
from train.lora.lokr import SCALED
from train.lora.targets import base_layer


@contextmanager
def lora_at(transformer: nn.Module, strength: float) -> Iterator[None]:
    """Inside, the LoRA's update is multiplied with `strength`; 0 gives the base. Afterwards every bit is as before.

    lora_B (a LoKr's w1) is multiplied, as PEFT multiplies its scale. At 0 a DoRA's magnitudes become the lengths of the
    base's rows. Queues work and waits for nothing.
    """
    scaled, magnitudes = [], {}
    if strength != 1:
        for name, parameter in lora_parameters(transformer).items():
            layer, _, kind = name.rpartition(".")
            if kind in SCALED:
                scaled.append(parameter.data)
            elif kind == "lora_magnitude_vector" and strength == 0:
                weight = base_layer(transformer, layer).weight
                none = torch.zeros(1, weight.shape[1]), torch.zeros(weight.shape[0], 1)
                magnitudes[parameter.data] = magnitude(weight, *none)
    touched = [*scaled, *magnitudes]
    before = [values.clone() for values in touched]
    if scaled:
        torch._foreach_mul_(scaled, strength)
    for values, others in magnitudes.items():
        values.copy_(others)
    try:
        yield
    finally:
        if touched:
            torch._foreach_copy_(touched, before)
