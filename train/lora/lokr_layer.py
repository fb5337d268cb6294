"""PEFT's LoKr layer with a forward pass that multiplies factor by factor (train/lora/lokr.py), put around a linear layer.

Imports PEFT, so it is imported where a LoKr is put on. PEFT's own forward pass also draws a random number for each layer in
each training step, for a module dropout that is off, and so leaves the graph that a compiler makes of a block.
"""

from collections.abc import Mapping
from typing import Any

import torch
from peft import LoKrConfig
from peft.tuners.lokr import layer as peft_lokr
from torch import nn

from train.lora.lokr import KINDS, kronecker_linear
from train.lora.spec import ADAPTER, LoraSpec


class LoKrLinear(peft_lokr.Linear):
    """The frozen layer `base_layer` with the update of one adapter; no dropout, nothing merged."""

    def forward(self, x: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        output: torch.Tensor = self.base_layer(x, *args, **kwargs)
        if self.disable_adapters:
            return output
        weights = self.weights()
        dtype = next(iter(weights.values())).dtype
        return (output + kronecker_linear(x.to(dtype), weights, self.scaling[ADAPTER])).to(output.dtype)

    def weights(self) -> dict[str, torch.Tensor]:
        """Those of KINDS that the layer has."""
        return {kind: values[ADAPTER] for kind in KINDS if ADAPTER in (values := getattr(self, kind))}


def put_on(transformer: nn.Module, name: str, spec: LoraSpec, device: torch.device) -> None:
    """Put a LoKr of `spec` around the linear layer `name`; its weights are trainable, and uninitialized."""
    layer = _around(transformer.get_submodule(name), spec)
    for kind in layer.weights():
        values = getattr(layer, kind)
        values[ADAPTER] = nn.Parameter(torch.empty_like(values[ADAPTER], device=device))
    transformer.set_submodule(name, layer)


def wear(transformer: nn.Module, name: str, weights: Mapping[str, torch.Tensor], strength: float) -> None:
    """Put a LoKr with these weights (the scale in them) around the linear layer `name`: any factors, any ranks."""
    layer = _around(transformer.get_submodule(name), LoraSpec((name,), 1, 1.0, type="lokr"))
    for kind in layer.weights():
        del getattr(layer, kind)[ADAPTER]
    for kind, tensor in weights.items():
        getattr(layer, kind)[ADAPTER] = nn.Parameter(tensor, requires_grad=False)
    layer.set_scale(ADAPTER, strength)
    transformer.set_submodule(name, layer)


def _around(base: nn.Module, spec: LoraSpec) -> LoKrLinear:
    """PEFT's layer on the meta device: it would draw weights that are overwritten."""
    config = LoKrConfig(r=spec.rank, alpha=spec.alpha, decompose_factor=spec.factor, decompose_both=spec.decompose_both)
    with torch.device("meta"):
        return LoKrLinear(base, ADAPTER, config, r=spec.rank, alpha=spec.alpha)
