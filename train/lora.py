"""LoRA on the frozen transformer: which layers, injection by PEFT, and the file that diffusers and ComfyUI load.

A file holds `transformer.<module>.lora_A.weight` and `lora_B.weight` with the scale alpha/rank (rsLoRA: alpha/√rank)
multiplied into lora_B, and no alpha tensors: then every reader applies the right scale, also those that ignore
metadata (ComfyUI) or `.alpha` (diffusers beside lora_A names). Rank, alpha and the scale stand in the header.
"""

import hashlib
import json
import math
import os
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from qwen_image.transformer import DEAD_IN_LAST_BLOCK, QwenImageTransformer
from train.config import TrainConfig

ADAPTER = "default"  # PEFT's name of the one adapter
PREFIX = "transformer."  # diffusers' name of the component inside a LoRA file


@dataclass(frozen=True)
class LoraSpec:
    """The shape of a LoRA. `scale` is what lora_B·lora_A is multiplied with."""

    target_modules: tuple[str, ...]
    rank: int
    alpha: float
    dropout: float = 0.0
    rslora: bool = False
    dora: bool = False

    @classmethod
    def from_config(cls, config: TrainConfig) -> "LoraSpec":
        return cls(
            config.lora_target_modules,
            config.lora_rank,
            config.alpha,
            config.lora_dropout,
            config.lora_rslora,
            config.lora_dora,
        )

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return {**asdict(self), "target_modules": sorted(self.target_modules)}

    @property
    def scale(self) -> float:
        return self.alpha / math.sqrt(self.rank) if self.rslora else self.alpha / self.rank


def linear_layers(transformer: QwenImageTransformer) -> list[str]:
    """Full names of all linear layers that a LoRA can adapt: those of the last block's dead text half are left out."""
    last = f"transformer_blocks.{transformer.config.num_layers - 1}."
    dead = tuple(last + name for name in DEAD_IN_LAST_BLOCK)
    return [
        name
        for name, module in transformer.named_modules()
        if isinstance(module, nn.Linear) and not name.startswith(dead)
    ]


def resolve_targets(transformer: QwenImageTransformer, targets: Iterable[str]) -> list[str]:
    """Full names of the layers that `targets` (name endings such as `to_q` or `img_mlp.net.2`) select, in model order.

    Raises ValueError for a target that selects nothing, with the names that exist.
    """
    names = linear_layers(transformer)
    chosen: set[str] = set()
    for target in targets:
        matches = {name for name in names if name == target or name.endswith("." + target)}
        if not matches:
            endings = sorted({name.split(".", 2)[2].removeprefix("attn.") for name in names if "blocks." in name})
            others = sorted(name for name in names if "blocks." not in name)
            raise ValueError(
                f"lora_target_modules: no linear layer is called {target!r}; there are {', '.join(endings + others)}"
            )
        chosen |= matches
    return [name for name in names if name in chosen]


def inject_lora(transformer: QwenImageTransformer, spec: LoraSpec, seed: int = 0) -> list[str]:
    """Freeze the transformer and add trainable LoRA weights (float32) to its target layers; returns their names.

    lora_A is Kaiming-uniform as in PEFT, but drawn from (seed, layer name): every rank, device and choice of targets
    starts with the same weights. lora_B is zero, so the model's output does not change. Raises ValueError for
    unknown targets.
    """
    from peft import LoraConfig, inject_adapter_in_model

    modules = resolve_targets(transformer, spec.target_modules)
    transformer.requires_grad_(False)
    config = LoraConfig(
        r=spec.rank,
        lora_alpha=spec.alpha,
        lora_dropout=spec.dropout,
        use_rslora=spec.rslora,
        use_dora=spec.dora,
        target_modules=modules,
    )
    inject_adapter_in_model(config, transformer, adapter_name=ADAPTER)
    for name, parameter in transformer.named_parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.float()
            if ".lora_A." in name:
                parameter.data.copy_(_initial_lora_a(seed, name, parameter.shape))
    return modules


def _initial_lora_a(seed: int, name: str, shape: torch.Size) -> torch.Tensor:
    digest = hashlib.blake2b(f"{seed}/{name}".encode(), digest_size=8).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest, "little") >> 1)
    bound = 1 / math.sqrt(shape[1])  # Kaiming-uniform with a = √5
    return torch.empty(shape).uniform_(-bound, bound, generator=generator)


def short_name(parameter_name: str) -> str:
    """`transformer_blocks.0.attn.to_q.lora_A.default.weight` → `transformer_blocks.0.attn.to_q.lora_A`."""
    return parameter_name.replace(f".{ADAPTER}.weight", "").replace(f".{ADAPTER}", "")


def lora_parameters(transformer: nn.Module) -> dict[str, nn.Parameter]:
    """The trainable parameters by their short name, `<module>.lora_A` / `lora_B` / `lora_magnitude_vector`."""
    return {short_name(name): p for name, p in transformer.named_parameters() if p.requires_grad}


def save_lora(
    path: Path, tensors: dict[str, torch.Tensor], spec: LoraSpec, metadata: dict[str, str], dtype: torch.dtype
) -> None:
    """Write a LoRA file: `tensors` by short name (see `short_name`), whole, not partitioned.

    Written under a temporary name, flushed to the disk, then renamed: a reader never sees half a file.
    """
    from safetensors.torch import save_file

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
    temporary = path.with_name(path.name + ".tmp")
    save_file(state, temporary, metadata=header)
    with temporary.open("rb") as file:
        os.fsync(file.fileno())
    temporary.replace(path)


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
    names = {name: name for name in _base_layer_names(transformer)}
    names |= {name.replace(".", "_"): name for name in names}
    layers: dict[str, dict[str, torch.Tensor]] = {}
    for key, tensor in tensors.items():
        module, kind = _split_lora_key(key)
        if module not in names or kind is None:
            raise ValueError(f"{path}: {key} is no LoRA weight of a layer that this transformer has")
        layers.setdefault(names[module], {})[kind] = tensor.float()
    default_scale = _metadata_scale(metadata)
    for name, layer in layers.items():
        if not {"lora_A", "lora_B"} <= layer.keys():
            raise ValueError(f"{path}: {name} has only {', '.join(layer)}; the file is incomplete")
        base = transformer.get_submodule(name)
        assert isinstance(base, nn.Linear)
        weight = base.weight
        shape = (layer["lora_B"].shape[0], layer["lora_A"].shape[1])
        if shape != tuple(weight.shape) or layer["lora_B"].shape[1] != len(layer["lora_A"]):
            raise ValueError(
                f"{path}: LoRA of {name} is made for a {shape[0]}×{shape[1]} layer, but this model's is "
                f"{weight.shape[0]}×{weight.shape[1]}; it belongs to another model"
            )
        alpha = layer.pop("alpha", None)
        scale = default_scale if alpha is None else alpha.item() / len(layer["lora_A"])
        layer["lora_B"] = layer["lora_B"] * scale
    return LoraFile(layers, metadata)


def _base_layer_names(transformer: nn.Module) -> list[str]:
    return [name for name, module in transformer.named_modules() if isinstance(module, nn.Linear)]


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


def attach_lora(transformer: QwenImageTransformer, lora: LoraFile, strength: float = 1.0) -> None:
    """Put a LoRA file onto the transformer as an adapter for inference; ranks may differ from layer to layer."""
    from peft import LoraConfig, inject_adapter_in_model

    ranks = lora.ranks()
    rank = max(ranks.values())
    config = LoraConfig(
        r=rank,
        lora_alpha=rank,
        rank_pattern={f"^{name}$": r for name, r in ranks.items() if r != rank},
        alpha_pattern={f"^{name}$": r for name, r in ranks.items() if r != rank},
        target_modules=list(ranks),
        use_dora=any("lora_magnitude_vector" in layer for layer in lora.layers.values()),
    )
    inject_adapter_in_model(config, transformer, adapter_name=ADAPTER)
    for name, layer in lora.layers.items():
        module: Any = transformer.get_submodule(name)
        for kind, tensor in layer.items():
            holder = getattr(module, kind)[ADAPTER]
            holder.weight.data.copy_(tensor)
        module.set_scale(ADAPTER, strength)
    transformer.requires_grad_(False)


def set_lora_enabled(transformer: nn.Module, enabled: bool) -> None:
    """Switch an attached LoRA on or off (off: the base model's output, bit for bit)."""
    from peft.tuners.lora import LoraLayer

    for module in transformer.modules():
        if isinstance(module, LoraLayer):
            module.enable_adapters(enabled)
