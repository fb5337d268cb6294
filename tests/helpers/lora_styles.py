"""LoRA files in every spelling that programs write, and what each means: alpha/rank · B·A per layer."""

import json
from pathlib import Path

import torch
from safetensors.torch import save_file

PLAIN = ("", "{}", ".lora_A.weight", ".lora_B.weight")
STYLES = {  # prefix, layer, down, up
    "transformer.": ("transformer.", "{}", ".lora_A.weight", ".lora_B.weight"),
    "diffusion_model.": ("diffusion_model.", "{}", ".lora_A.weight", ".lora_B.weight"),
    "diffusion_model. down": ("diffusion_model.", "{}", ".lora_down.weight", ".lora_up.weight"),
    "none": PLAIN,
    "adapter name": ("", "{}", ".lora_A.default.weight", ".lora_B.default.weight"),
    "lora_unet_": ("lora_unet_", "flat", ".lora_down.weight", ".lora_up.weight"),
    "lycoris_": ("lycoris_", "flat", ".lora_down.weight", ".lora_up.weight"),
    "lora_transformer_": ("lora_transformer_", "flat", ".lora_down.weight", ".lora_up.weight"),
    "lora.down": ("transformer.", "{}", ".lora.down.weight", ".lora.up.weight"),
}


def write_style(
    path: Path,
    style: str,
    layers: dict[str, tuple[int, int, int, float | None]],
    seed: int = 0,
    header: bool = False,
) -> dict[str, torch.Tensor]:
    """Write a file and return the update of each layer. `layers`: name → (out, in, rank, alpha or None for no alpha).

    `header`: the alphas go into diffusers' metadata, by patterns, instead of tensors.
    """
    generator, state, updates = torch.Generator().manual_seed(seed), {}, {}
    prefix, name_style, down, up = STYLES[style]
    for name, (outputs, inputs, rank, alpha) in layers.items():
        stem = prefix + (name.replace(".", "_") if name_style == "flat" else name)
        a = torch.randn(rank, inputs, generator=generator)
        b = torch.randn(outputs, rank, generator=generator)
        state |= {stem + down: a, stem + up: b}
        if alpha is not None and not header:
            state[f"{stem}.alpha"] = torch.tensor(float(alpha))
        updates[name] = (1 if alpha is None else alpha / rank) * (b @ a)
    metadata = None
    if header:
        adapter = {
            "transformer.r": 1,
            "transformer.lora_alpha": 1,
            "transformer.rank_pattern": {name: rank for name, (_, _, rank, _) in layers.items()},
            "transformer.alpha_pattern": {name: alpha or rank for name, (_, _, rank, alpha) in layers.items()},
        }
        metadata = {"lora_adapter_metadata": json.dumps(adapter), "format": "pt"}
    save_file(state, path, metadata)
    return updates
