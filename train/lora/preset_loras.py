"""LoRAs with weights: merged into the frozen base (preset LoRAs, before a new one is trained on top), or added up to one.

presets = [Preset.read(text, transformer) for text in config.preset_lora_path]      # "style.safetensors:0.8"
merge_presets(transformer, presets)
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from files.shown import shown
from qwen_image.loading.model_files import weights_fingerprint
from qwen_image.model.family import Member
from train.config.check_paths import split_weight
from train.lora.dora import magnitude
from train.lora.lokr import SCALED, is_lokr, update_of
from train.lora.lora_file import Layer, LoraFile, read_lora, trained_for_another
from train.lora.targets import base_layer


@dataclass(frozen=True)
class Preset:
    """A LoRA file and the weight it is merged with."""

    path: Path
    weight: float
    lora: LoraFile

    @classmethod
    def read(cls, text: str, transformer: nn.Module) -> "Preset":
        """`FILE` or `FILE:WEIGHT`. Raises FileNotFoundError, or ValueError when the file is no LoRA of `transformer`."""
        path, weight = split_weight(text)
        lora = read_lora(path, transformer)
        if weight != 1 and lora.is_dora:
            raise ValueError(f"{shown(path)} is a DoRA: it has no weight but 1, got {weight:g}")
        return cls(path, weight, lora)

    def notes(self, member: Member) -> tuple[str, ...]:
        """Lines for people about its use with a model that is `member` of the family."""
        return (*self.lora.notes, *trained_for_another(self.path, self.lora.metadata, member))

    def identity(self) -> dict[str, Any]:
        """What a checkpoint remembers of it."""
        return {"fingerprint": weights_fingerprint([self.path])[:16], "weight": self.weight}


def merged(weight: torch.Tensor, name: str, presets: Sequence[Preset]) -> torch.Tensor:
    """`weight` [out, in] of layer `name` with all presets in it, computed in float32 where it lies, in its own dtype.

    W + weight · lora_B · lora_A (a LoKr's w1 ⊗ w2), one preset after the other, rounded once. For DoRA (train/lora/dora.py)
    each row is then scaled to the length that the magnitude vector or ComfyUI's dora_scale says.
    """
    total = weight.float()
    for preset in presets:
        layer = preset.lora.layers.get(name)
        if layer is None:
            continue
        length = layer.get("lora_magnitude_vector")
        if "dora_scale" in layer:
            length = magnitude(total, layer["lora_A"], layer["lora_B"], layer["dora_scale"])
        total = total + preset.weight * update_of(layer, total.device)
        if length is not None:
            total = total * (length.to(total.device) / total.norm(dim=1)).unsqueeze(1)
    result = total.to(weight.dtype)
    if not result.isfinite().all():
        files = ", ".join(shown(preset.path) for preset in presets if name in preset.lora.layers)
        raise ValueError(f"the weight of {name} is no longer finite with {files} merged in: their values are too large")
    return result


def merge_presets(transformer: nn.Module, presets: Sequence[Preset]) -> int:
    """Merge into the weights of a transformer that lies whole on one device, in place; returns the number of layers."""
    names = sorted({name for preset in presets for name in preset.lora.layers})
    for name in names:
        parameter = base_layer(transformer, name).weight
        with torch.no_grad():
            parameter.data.copy_(merged(parameter.data, name, presets))
    return len(names)


def as_one(loras: Sequence[Preset]) -> LoraFile:
    """Several LoRAs as one, the sum of their updates, each times its weight; layer by layer a LoRA of the ranks' sum:

    Σ weight · lora_B · lora_A = [w₁ lora_B₁, w₂ lora_B₂, …] · [lora_A₁; lora_A₂; …]

    A single one is itself. Raises ValueError for a DoRA among several, whose update depends on the weights it is put upon, and
    for a LoKr on a layer that another one adapts too: their sum is no Kronecker product.
    """
    for each in loras:
        if each.lora.is_dora and len(loras) > 1:
            raise ValueError(
                f"{shown(each.path)} is a DoRA and can't be added to others: merge it first (train/merge_lora.py)"
            )
    if len(loras) == 1 and loras[0].weight == 1:
        return loras[0].lora
    layers: dict[str, Layer] = {}
    for name in dict.fromkeys(name for each in loras for name in each.lora.layers):
        parts = [each for each in loras if name in each.lora.layers]
        kronecker = [each for each in parts if is_lokr(each.lora.layers[name])]
        if kronecker and len(parts) > 1:
            raise ValueError(
                f"{shown(kronecker[0].path)} is a LoKr and can't be added to another on {name}: merge it first "
                "(train/merge_lora.py)"
            )
        scaled = [
            {
                kind: each.weight * tensor if kind in SCALED else tensor
                for kind, tensor in each.lora.layers[name].items()
            }
            for each in parts
        ]
        layers[name] = scaled[0]
        if not kronecker:
            layers[name] = {
                "lora_A": torch.cat([layer["lora_A"] for layer in scaled]),
                "lora_B": torch.cat([layer["lora_B"] for layer in scaled], dim=1),
            }
    return replace(loras[0].lora, layers=layers, notes=tuple(note for each in loras for note in each.lora.notes))
