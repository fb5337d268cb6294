"""The LoRA file: what diffusers and ComfyUI load, and whatever other programs wrote.

A file holds `transformer.<module>.lora_A.weight` and `lora_B.weight` with the scale alpha/rank (rsLoRA: alpha/√rank)
multiplied into lora_B, and no alpha tensors: then every reader applies the right scale, also those that ignore
metadata (ComfyUI) or `.alpha` (diffusers beside lora_A names). Rank, alpha and the scale stand in the header.
"""

import json
import math
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

from files.atomic_files import whole_file
from files.shown import shown
from qwen_image.loading.safetensors_writer import safetensors_blocks
from train.lora.spec import ADAPTER, LoraSpec
from train.lora.targets import base_layer

PREFIX = "transformer."  # diffusers' name of the component inside a LoRA file


def save_lora(
    path: Path, tensors: dict[str, torch.Tensor], spec: LoraSpec, metadata: dict[str, str], dtype: torch.dtype
) -> None:
    """Write a LoRA file: `tensors` by short name (see `short_name`), whole, not partitioned.

    A reader never sees half a file. Raises OSError.
    """
    state = {}
    for name, tensor in tensors.items():
        tensor = tensor.detach().float().cpu()
        if name.endswith("lora_B"):
            tensor = tensor * spec.scale
        suffix = "" if name.endswith("lora_magnitude_vector") else ".weight"
        state[f"{PREFIX}{name}{suffix}"] = tensor.to(dtype).contiguous()
    header = {
        "format": "pt",
        "lora_rank": str(spec.rank),
        "lora_alpha": str(spec.alpha),
        "lora_scale_in_lora_B": repr(spec.scale),
        "lora_target_modules": ",".join(spec.target_modules),
        **metadata,
    }
    ordered = dict(sorted(state.items()))
    layout = {name: (tensor.dtype, tensor.shape) for name, tensor in ordered.items()}
    with whole_file(path) as file:
        for block in safetensors_blocks(layout, ordered.values(), header):
            file.write(block)


@dataclass(frozen=True)
class LoraFile:
    """A LoRA read from disk: per layer lora_A [r, in], lora_B [out, r] (scale included), DoRA magnitude [out] if any."""

    layers: dict[str, dict[str, torch.Tensor]]
    metadata: dict[str, str]

    def ranks(self) -> dict[str, int]:
        return {name: len(layer["lora_A"]) for name, layer in self.layers.items()}


def read_lora(path: Path, transformer: nn.Module) -> LoraFile:
    """Read a LoRA file by any of the names in use: ours and diffusers', DiffSynth's, ComfyUI's, kohya's.

    Raises FileNotFoundError, and ValueError when the file is no LoRA of this transformer, naming the first layer that
    does not fit.
    """
    from safetensors import SafetensorError, safe_open

    if not path.is_file():
        raise FileNotFoundError(f"no LoRA file at {path}")
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (no iterator)
    except SafetensorError as error:
        raise ValueError(f"{path} is no readable safetensors file ({error})") from error
    names = {name: name for name in _adaptable_names(transformer)}
    names |= {name.replace(".", "_"): name for name in names}
    layers: dict[str, dict[str, torch.Tensor]] = {}
    for key, tensor in tensors.items():
        module, kind = _split_lora_key(key)
        if module not in names or kind is None:
            raise ValueError(f"{path}: {shown(key)} is no LoRA weight of a layer that this transformer has")
        layers.setdefault(names[module], {})[kind] = tensor.float()
    default_scale = _metadata_scale(metadata)
    for name, layer in layers.items():
        if not {"lora_A", "lora_B"} <= layer.keys():
            raise ValueError(f"{path}: {name} has only {', '.join(layer)}; the file is incomplete")
        base = base_layer(transformer, name)  # its weight may be partitioned (ZeRO-3)
        shape = (layer["lora_B"].shape[0], layer["lora_A"].shape[1])
        if shape != (base.out_features, base.in_features) or layer["lora_B"].shape[1] != len(layer["lora_A"]):
            raise ValueError(
                f"{path}: LoRA of {name} is made for a {shape[0]}×{shape[1]} layer, but this model's is "
                f"{base.out_features}×{base.in_features}; it belongs to another model"
            )
        alpha = layer.pop("alpha", None)
        scale = default_scale if alpha is None else alpha.item() / len(layer["lora_A"])
        layer["lora_B"] = layer["lora_B"] * scale
    return LoraFile(layers, metadata)


def _adaptable_names(transformer: nn.Module) -> list[str]:
    linear = [name for name, module in transformer.named_modules() if isinstance(module, nn.Linear)]
    return [name.removesuffix(".base_layer") for name in linear if ".lora_" not in name]


def _split_lora_key(key: str) -> tuple[str, str | None]:
    """`transformer.a.b.lora_A.weight` → (`a.b`, `lora_A`); down/up and alpha likewise; None for anything else."""
    for prefix in (PREFIX, "diffusion_model.", "lora_unet_", "lycoris_"):
        key = key.removeprefix(prefix)
    key = key.replace(f".{ADAPTER}.", ".")
    for suffix, kind in (
        (".lora_A.weight", "lora_A"),
        (".lora_B.weight", "lora_B"),
        (".lora_down.weight", "lora_A"),
        (".lora_up.weight", "lora_B"),
        (".lora.down.weight", "lora_A"),
        (".lora.up.weight", "lora_B"),
        (".alpha", "alpha"),
        (".lora_magnitude_vector", "lora_magnitude_vector"),
        (".lora_magnitude_vector.weight", "lora_magnitude_vector"),
    ):
        if key.endswith(suffix):
            return key.removesuffix(suffix), kind
    return key, None


def _metadata_scale(metadata: dict[str, str]) -> float:
    """alpha/rank of files that diffusers' `save_lora_weights` wrote with adapter metadata; 1 for all others."""
    if "lora_adapter_metadata" not in metadata:
        return 1.0
    adapter = json.loads(metadata["lora_adapter_metadata"])
    rank, alpha = adapter.get("transformer.r"), adapter.get("transformer.lora_alpha")
    if not rank or alpha is None:
        return 1.0
    return alpha / math.sqrt(rank) if adapter.get("transformer.use_rslora") else alpha / rank
