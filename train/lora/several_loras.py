"""Several LoRAs as one: the sum of their updates, each times its weight, written as a LoRA of the ranks' sum."""

from collections.abc import Sequence
from dataclasses import replace

import torch

from files.shown import shown
from train.lora.lora_file import Layer, LoraFile
from train.lora.preset_loras import Preset


def as_one(loras: Sequence[Preset]) -> LoraFile:
    """Σ weight · lora_B · lora_A = [w₁ lora_B₁, w₂ lora_B₂, …] · [lora_A₁; lora_A₂; …], layer by layer.

    A single one is itself. Raises ValueError for a DoRA among several: its update depends on the weights it is put upon.
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
        parts = [(each.weight, each.lora.layers[name]) for each in loras if name in each.lora.layers]
        layers[name] = {
            "lora_A": torch.cat([layer["lora_A"] for _, layer in parts]),
            "lora_B": torch.cat([weight * layer["lora_B"] for weight, layer in parts], dim=1),
        }
    return replace(loras[0].lora, layers=layers, notes=tuple(note for each in loras for note in each.lora.notes))
