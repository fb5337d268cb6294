"""LoRA or LoKr on the frozen transformer: injection by PEFT, starting values, starting files, switching on and off."""

import hashlib
import math
import re
import warnings
from collections.abc import Collection
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from qwen_image.model.family import Member
from qwen_image.model.transformer import QwenImageTransformer
from train.lora import lokr
from train.lora.dora import magnitude
from train.lora.lokr import is_lokr
from train.lora.spec import ADAPTER, LoraSpec
from train.lora.targets import base_layer, resolve_targets

if TYPE_CHECKING:
    from peft import LoraConfig

    from train.lora.lora_file import Layer, LoraFile


# Ends of the names of weights that begin drawn, and of those that begin at zero.
DRAWN = (f".lora_A.{ADAPTER}.weight", *(f".lokr_{half}.{ADAPTER}" for half in ("w1", "w1_a", "w1_b", "w2_a")))
ZERO = (f".lora_B.{ADAPTER}.weight", f".lokr_w2.{ADAPTER}", f".lokr_w2_b.{ADAPTER}")


def inject_lora(
    transformer: QwenImageTransformer, spec: LoraSpec, seed: int = 0, dtype: torch.dtype = torch.float32
) -> list[str]:
    """Freeze the transformer and add trainable LoRA weights of `dtype` to its target layers; returns their names.

    lora_A is Kaiming-uniform as in PEFT, but drawn from (seed, layer name): every rank, device and choice of targets
    starts with the same weights. lora_B is zero, so the model's output does not change. Of a LoKr, w2 or the second half of
    it is zero and the rest drawn, as in LyCORIS (PEFT's init_weights="lycoris"), whose learning rates people know. Raises
    ValueError for unknown targets.
    """
    modules = resolve_targets(transformer, spec.target_modules)
    transformer.requires_grad_(False)
    if spec.is_lokr:
        _put_lokr_on(transformer, modules, spec)
    else:
        _put_lora_on(transformer, modules, spec)
    for name, parameter in transformer.named_parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.to(dtype)
            if name.endswith(DRAWN):
                parameter.data.copy_(_drawn(seed, name, parameter.shape))
            elif name.endswith(ZERO):
                parameter.data.zero_()
    return modules


def _put_lokr_on(transformer: QwenImageTransformer, modules: list[str], spec: LoraSpec) -> None:
    from train.lora.lokr_layer import put_on

    for name in modules:
        put_on(transformer, name, spec, transformer.txt_norm.weight.device)  # no LoRA goes around a norm


def _put_lora_on(transformer: QwenImageTransformer, modules: list[str], spec: LoraSpec) -> None:
    from peft import LoraConfig

    config = LoraConfig(
        r=spec.rank,
        lora_alpha=spec.alpha,
        lora_dropout=spec.dropout,
        use_rslora=spec.rslora,
        use_dora=spec.dora,
        target_modules=modules,
    )
    _adapt(transformer, config)


def _adapt(transformer: QwenImageTransformer, config: "LoraConfig") -> None:
    """PEFT's layers around the targets; a plain LoRA's weights are left uninitialized.

    PEFT would draw every layer's weights on the CPU, seconds at full size, to have them overwritten. A DoRA's magnitudes are
    computed from them.
    """
    from peft import inject_adapter_in_model
    from peft.tuners.lora import LoraLayer

    inject_adapter_in_model(config, transformer, adapter_name=ADAPTER, low_cpu_mem_usage=not config.use_dora)
    device = transformer.txt_norm.weight.device  # no LoRA goes around a norm
    for layer in transformer.modules():
        if isinstance(layer, LoraLayer):
            for side in (layer.lora_A[ADAPTER], layer.lora_B[ADAPTER]):
                if side.weight.is_meta:
                    side.weight = nn.Parameter(torch.empty_like(side.weight, device=device), side.weight.requires_grad)


def _drawn(seed: int, name: str, shape: torch.Size) -> torch.Tensor:
    digest = hashlib.blake2b(f"{seed}/{name}".encode(), digest_size=8).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest, "little") >> 1)
    bound = 1 / math.sqrt(shape[1])  # Kaiming-uniform with a = √5
    return torch.empty(shape).uniform_(-bound, bound, generator=generator)


def short_name(parameter_name: str) -> str:
    """`transformer_blocks.0.attn.to_q.lora_A.default.weight` → `transformer_blocks.0.attn.to_q.lora_A`."""
    return parameter_name.replace(f".{ADAPTER}.weight", "").replace(f".{ADAPTER}", "")


def lora_parameters(transformer: nn.Module) -> dict[str, nn.Parameter]:
    """The trainable parameters by their short name, `<module>.lora_A` / `lora_B` / `lora_magnitude_vector` / `lokr_w1` …"""
    return {short_name(name): p for name, p in transformer.named_parameters() if p.requires_grad}


def start_from(transformer: QwenImageTransformer, lora: "LoraFile", spec: LoraSpec) -> int:
    """Put a LoRA file into injected, still untrained LoRA weights; returns how many layers it fills.

    What the layer computes is then what the file says, exactly: a lower rank fills the first rows, and the rest starts as
    in a new run (lora_B zero). In a DoRA run, the magnitude of a plain LoRA's layer is the length that it gives the rows.
    Layers that the file doesn't have stay as they are (an update of zero). Raises ValueError when the file adapts a layer
    that this run doesn't, has a higher rank, is of another type or has other factors, or is a DoRA and the run is none.
    """
    parameters = lora_parameters(transformer)
    check_start(lora, spec, {name.rpartition(".")[0] for name in parameters})
    for name, layer in lora.layers.items():
        if spec.is_lokr:
            lokr.start_layer(parameters, name, layer, spec.scale)
            continue
        rank = len(layer["lora_A"])
        parameters[f"{name}.lora_A"].data[:rank] = layer["lora_A"]
        parameters[f"{name}.lora_B"].data[:, :rank] = layer["lora_B"] / spec.scale
        if spec.dora:
            parameters[f"{name}.lora_magnitude_vector"].data.copy_(magnitude_of(transformer, name, layer))
    return len(lora.layers)


def check_start(lora: "LoraFile", spec: LoraSpec, adapted: Collection[str]) -> None:
    """Raise ValueError when a run of `spec` on the `adapted` layers can't start from a LoRA file."""
    for name, layer in lora.layers.items():
        if name not in adapted:
            raise ValueError(f"lora_checkpoint adapts {name}, this run doesn't: add it to lora_target_modules")
        if is_lokr(layer) != spec.is_lokr:
            has, trains = ("LoKr", "LoRA") if is_lokr(layer) else ("LoRA", "LoKr")
            raise ValueError(
                f"lora_checkpoint has a {has} on {name}, this run trains a {trains}: say --lora_type {has.lower()}, or merge "
                "the file into the base with --preset_lora_path"
            )
        if spec.is_lokr:
            lokr.check_start(name, layer, spec)
            continue
        rank = len(layer["lora_A"])
        if rank > spec.rank:
            raise ValueError(
                f"lora_checkpoint has rank {rank} on {name}, this run has lora_rank {spec.rank}: say at least {rank}"
            )
        if layer.keys() > {"lora_A", "lora_B"} and not spec.dora:
            raise ValueError(
                f"lora_checkpoint has {', '.join(sorted(layer.keys() - {'lora_A', 'lora_B'}))} on {name}: it is a DoRA, so "
                "this run needs lora_dora"
            )


def check_starting_file(
    path: Path | None, empty: QwenImageTransformer, spec: LoraSpec, member: Member
) -> tuple[str, ...]:
    """Read `--lora_checkpoint`, if there is one, before the model is; lines for people about it.

    Raises what `read_lora` and `check_start` raise. `empty`: the transformer on the meta device.
    """
    from train.lora.lora_file import read_lora, trained_for_another

    if path is None:
        return ()
    lora = read_lora(path, empty)
    check_start(lora, spec, resolve_targets(empty, spec.target_modules))
    return (*lora.notes, *trained_for_another(path, lora.metadata, member))


def magnitude_of(transformer: nn.Module, name: str, layer: dict[str, torch.Tensor]) -> torch.Tensor:
    """PEFT's magnitude vector [out] of a layer from a file; for a plain LoRA the one that changes nothing."""
    if "lora_magnitude_vector" in layer:
        return layer["lora_magnitude_vector"]
    weight = base_layer(transformer, name).weight
    return magnitude(weight, layer["lora_A"], layer["lora_B"], layer.get("dora_scale"))


def attach_lora(transformer: QwenImageTransformer, lora: "LoraFile", strength: float = 1.0) -> None:
    """Put a LoRA file onto the transformer as an adapter for inference; ranks, DoRA and LoKr may differ from layer to layer."""
    _attach_plain_and_dora(transformer, {n: layer for n, layer in lora.layers.items() if not is_lokr(layer)}, strength)
    _attach_lokr(transformer, {n: layer for n, layer in lora.layers.items() if is_lokr(layer)}, strength)
    transformer.requires_grad_(False)


def _attach_lokr(transformer: QwenImageTransformer, layers: "dict[str, Layer]", strength: float) -> None:
    from train.lora.lokr_layer import wear

    exact = transformer.txt_norm.weight  # no LoRA goes around a norm
    for name, layer in layers.items():
        wear(transformer, name, {kind: tensor.to(exact) for kind, tensor in layer.items()}, strength)


def _attach_plain_and_dora(transformer: QwenImageTransformer, layers: "dict[str, Layer]", strength: float) -> None:
    from peft import LoraConfig

    plain = {name for name, layer in layers.items() if layer.keys() == {"lora_A", "lora_B"}}
    magnitudes = {n: magnitude_of(transformer, n, layer) for n, layer in layers.items() if n not in plain}
    for names, dora in ((plain, False), (magnitudes.keys(), True)):
        ranks = {name: len(layer["lora_A"]) for name, layer in layers.items() if name in names}
        if not ranks:
            continue
        rank = max(ranks.values())
        others = {f"^{re.escape(name)}$": r for name, r in ranks.items() if r != rank}
        config = LoraConfig(
            r=rank,
            lora_alpha=rank,
            rank_pattern=others,
            alpha_pattern=others,
            target_modules=list(ranks),
            use_dora=dora,
        )
        with warnings.catch_warnings():  # of the second call: that there is an adapter already
            warnings.simplefilter("ignore")
            _adapt(transformer, config)
    exact = transformer.txt_norm.weight  # no LoRA goes around a norm
    for name, layer in layers.items():
        module: Any = transformer.get_submodule(name)
        for kind in ("lora_A", "lora_B"):
            weight = getattr(module, kind)[ADAPTER].weight  # PEFT makes it float8 where the base is
            dtype = exact.dtype if weight.dtype.itemsize == 1 else weight.dtype
            weight.data = layer[kind].to(exact.device, dtype)
        if name in magnitudes:
            module.lora_magnitude_vector[ADAPTER].weight.data.copy_(magnitudes[name])
        module.set_scale(ADAPTER, strength)


def set_lora_strength(transformer: nn.Module, strength: float) -> None:
    """Multiply the update of an attached LoRA with `strength`; 0 switches it off (the base model's output, bit for bit)."""
    from peft.tuners.tuners_utils import BaseTunerLayer

    for module in transformer.modules():
        if isinstance(module, BaseTunerLayer):
            module.enable_adapters(strength != 0)
            if strength != 0:
                module.set_scale(ADAPTER, strength)


def detach_lora(transformer: nn.Module) -> None:
    """Take an attached LoRA off again: the transformer is as if it had never been there, and can take another."""
    from peft.tuners.tuners_utils import BaseTunerLayer

    for name, module in [*transformer.named_modules()]:
        if isinstance(module, BaseTunerLayer):
            parent, _, child = name.rpartition(".")
            setattr(transformer.get_submodule(parent), child, module.get_base_layer())
    if hasattr(transformer, "peft_config"):
        del transformer.peft_config


def set_lora_enabled(transformer: nn.Module, enabled: bool) -> None:
    """Switch an attached LoRA on or off (off: the base model's output, bit for bit)."""
    from peft.tuners.tuners_utils import BaseTunerLayer

    for module in transformer.modules():
        if isinstance(module, BaseTunerLayer):
            module.enable_adapters(enabled)
