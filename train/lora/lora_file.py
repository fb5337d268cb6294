"""The LoRA file: what diffusers, ComfyUI and DiffSynth load, and whatever other programs wrote.

A file holds lora_A and lora_B of each layer with the scale alpha/rank (rsLoRA: alpha/√rank) multiplied into lora_B, and no
alpha tensors (kohya's spelling: alpha = rank): then every reader applies the right scale, also those that ignore metadata
(ComfyUI) or `.alpha` (diffusers beside lora_A names). Rank, alpha and the scale stand in the header. Of a LoKr the scale is
in w1, or in w1_a; what other programs make of its names stands in train/lora/lora_format.py.

    lora = read_lora(path, transformer)             # any spelling; refused by name if it is no LoRA of this transformer
    write_lora(path, lora.layers, "comfyui", metadata, torch.bfloat16)
"""

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from files.atomic_files import whole_file
from files.shown import shown
from qwen_image.loading.safetensors_writer import safetensors_blocks
from qwen_image.model.family import Member
from train.config.run_files import lora_file
from train.lora.adapter_metadata import AdapterMetadata
from train.lora.checkpoint_lora import checkpoint_spelling
from train.lora.dora import HEADER
from train.lora.lokr import KINDS, SCALED, incomplete, is_lokr, misshapen, rank_of
from train.lora.lora_format import SPELLINGS, TEXT_ENCODER, adaptable_layers, split_key, why_not
from train.lora.spec import LoraSpec
from train.lora.targets import base_layer

Layer = dict[str, torch.Tensor]
WEIGHTS = ("lora_A", "lora_B", *KINDS)  # matrices whose product is the update
MAGNITUDES = ("lora_magnitude_vector", "dora_scale")  # kept in float32: a rounded one changes every weight of its row
FAMILY = "model_family"  # in the header: which member of the family the LoRA was trained for
_NO_ALPHA = ("BOOL", "C64")  # torch would make 1 and the real part of them
_FLOATS = ("F64", "F32", "F16", "BF16", "F8_E4M3", "F8_E5M2")


def save_lora(
    path: Path,
    tensors: dict[str, torch.Tensor],
    spec: LoraSpec,
    metadata: dict[str, str],
    dtype: torch.dtype,
    lora_format: str = "diffusers",
) -> None:
    """Write trained weights, by short name (see `short_name`), whole, not partitioned. Raises OSError."""
    layers: dict[str, Layer] = {}
    for name, tensor in tensors.items():
        layer, _, kind = name.rpartition(".")
        tensor = tensor.detach().float().cpu()
        layers.setdefault(layer, {})[kind] = tensor * spec.scale if kind in SCALED else tensor
    own = {"lora_scale_in_lora_B": repr(spec.scale)}
    if spec.is_lokr:
        own = {"lokr_scale_in_w1": repr(spec.scale), "lokr_factor": str(spec.factor)}
    header = {
        "lora_rank": str(spec.rank),
        "lora_alpha": str(spec.alpha),
        **own,
        "lora_target_modules": ",".join(spec.target_modules),
        **metadata,
    }
    write_lora(path, layers, lora_format, header, dtype)


def write_lora(
    path: Path, layers: dict[str, Layer], lora_format: str, metadata: dict[str, str], dtype: torch.dtype
) -> None:
    """Write layers (the scale inside lora_B) as a program spells them; DoRA's magnitudes in float32, all else in `dtype`.

    A reader never sees half a file. Raises OSError, and ValueError for a DoRA or a LoKr in a spelling that has no name for
    its magnitudes or its factors.
    """
    spelling, state = SPELLINGS[lora_format], {}
    for name, layer in layers.items():
        for kind, tensor in layer.items():
            if kind not in spelling.endings:
                owner = "LoKr" if is_lokr(layer) else "DoRA"
                raise ValueError(f"lora_format {lora_format} has no name for a {owner}'s {kind}")
            kept = torch.float32 if kind in MAGNITUDES else dtype
            state[spelling.key(name, kind)] = tensor.detach().to("cpu", kept).contiguous()
        if "alpha" in spelling.endings:
            state[spelling.key(name, "alpha")] = torch.tensor(float(rank_of(layer) or 1), dtype=dtype)
    header = {"format": "pt", **metadata, "lora_format": lora_format}
    if any("dora_scale" in layer for layer in layers.values()):
        header |= HEADER
    if any(map(is_lokr, layers.values())):
        header |= {"lora_type": "lokr"}
    ordered = dict(sorted(state.items()))
    layout = {name: (tensor.dtype, tensor.shape) for name, tensor in ordered.items()}
    with whole_file(path) as file:
        for block in safetensors_blocks(layout, ordered.values(), header):
            file.write(block)


@dataclass(frozen=True)
class LoraFile:
    """A LoRA read from disk: per layer lora_A [r, in], lora_B [out, r] (scale included), and for DoRA either
    lora_magnitude_vector [out] or dora_scale [out, 1] (train/lora/dora.py); or a LoKr's factors (train/lora/lokr.py), the scale
    in w1; all float32.

    `dtype` is that of the file's weights; `notes` are lines for people about what was left out.
    """

    layers: dict[str, Layer]
    metadata: dict[str, str]
    dtype: torch.dtype = torch.float32
    notes: tuple[str, ...] = ()

    @property
    def is_dora(self) -> bool:
        return any(kind in layer for layer in self.layers.values() for kind in MAGNITUDES)


def read_lora(path: Path, transformer: nn.Module) -> LoraFile:
    """Read a LoRA file by any of the names in use: ours and diffusers', DiffSynth's, ComfyUI's, kohya's.

    A run folder stands for the LoRA of its end or else for its newest checkpoint (run_files.lora_file). Weights of a text
    encoder are left out, with a note. Raises FileNotFoundError, and ValueError when the file is no LoRA of this transformer
    or holds what can't be applied, naming the first key at fault; before weights are read, if names and shapes tell.
    """
    from safetensors import SafetensorError, safe_open

    path = lora_file(path)
    if not path.is_file():
        raise FileNotFoundError(f"no LoRA file at {shown(path)}")
    prefix, header, said = checkpoint_spelling(path) or ("", None, ())
    try:
        with safe_open(path, framework="pt") as file:
            metadata = header or file.metadata() or {}
            all_keys = list(file.keys())
            names = [key.removeprefix(prefix) for key in all_keys if key.startswith(prefix)]
            found, notes = _keys_by_layer(path, names, transformer, metadata)
            keys = {name: {kind: prefix + key for kind, key in kinds.items()} for name, kinds in found.items()}
            adapter = AdapterMetadata.read(metadata, shown(path))
            for name, kinds in keys.items():
                _check_shapes(path, name, kinds, file, base_layer(transformer, name))
            stored = {name: {k: file.get_tensor(key) for k, key in kinds.items()} for name, kinds in keys.items()}
    except SafetensorError as error:
        raise ValueError(f"{shown(path)} is no readable safetensors file ({error})") from error
    layers = {name: _scaled(path, name, layer, adapter) for name, layer in stored.items()}
    dtypes = [each.dtype for layer in stored.values() for kind, each in layer.items() if kind in WEIGHTS]
    dtype = dtypes[0] if len(set(dtypes)) == 1 and dtypes[0].itemsize > 1 else torch.float32
    return LoraFile(layers, metadata, dtype, (*said, *notes, *_without_effect(path, layers)))


def trained_for_another(path: Path, metadata: dict[str, str], member: Member) -> tuple[str, ...]:
    """A line for people when the file says that it was trained for another member of the family than `member`."""
    said = metadata.get(FAMILY, member.name)
    if said == member.name:
        return ()
    return (
        f"warning: {shown(path)} was trained for {shown(said)}, and this model is {member.name}: names and shapes fit, the "
        "result may not",
    )


def _without_effect(path: Path, layers: dict[str, Layer]) -> tuple[str, ...]:
    """A line for people about layers whose update is zero: alpha 0, or a file of a run that had not learned yet."""
    zero = [name for name, layer in layers.items() if any(kind in WEIGHTS and not layer[kind].any() for kind in layer)]
    if not zero:
        return ()
    return (f"{shown(path)}: the update of {len(zero)} of {len(layers)} layers is zero (first {zero[0]})",)


def _keys_by_layer(
    path: Path, keys: list[str], transformer: nn.Module, metadata: dict[str, str]
) -> tuple[dict[str, dict[str, str]], tuple[str, ...]]:
    """Layer → kind → key, and notes about what is left out. Raises ValueError for the first key that can't be used."""
    names = adaptable_layers(transformer)
    layers: dict[str, dict[str, str]] = {}
    encoder = [key for key in keys if TEXT_ENCODER.match(key)]
    for key in keys:
        if TEXT_ENCODER.match(key):
            continue
        module, kind = split_key(key)
        if module not in names or kind is None:
            raise ValueError(f"{shown(path)}: {shown(key)}: {why_not(key)}")
        if kind == "dora_scale" and "dora_scale" not in metadata:
            raise ValueError(
                f"{shown(path)}: {shown(key)}: a DoRA whose formula the file doesn't tell: LyCORIS and ComfyUI divide by "
                "different lengths; merge it into the base with the program that made it"
            )
        twin = layers.setdefault(names[module], {}).setdefault(kind, key)
        if twin != key:
            raise ValueError(
                f"{shown(path)}: {shown(twin)} and {shown(key)} are two spellings of one weight: the file was put together "
                "wrongly, and which one counts is not known"
            )
    if not layers:
        what = f"only {len(encoder)} weights of a text encoder" if encoder else "no weights"
        raise ValueError(f"{shown(path)} holds {what}: there is nothing in it for the transformer")
    if not encoder:
        return layers, ()
    return layers, (
        f"{shown(path)}: {len(encoder)} weights of a text encoder are left out (first {shown(encoder[0])}); "
        f"{len(layers)} layers of the transformer are used",
    )


def _check_shapes(path: Path, name: str, kinds: dict[str, str], file: Any, base: nn.Linear) -> None:
    """Raise ValueError unless these weights make a LoRA of `base` (whose own weight may be partitioned: ZeRO-3)."""
    shapes = {kind: list(file.get_slice(key).get_shape()) for kind, key in kinds.items()}
    where = f"{shown(path)}: "
    if problem := incomplete(kinds):
        raise ValueError(f"{where}{name} {problem}")
    for kind, key in kinds.items():
        dtype = file.get_slice(key).get_dtype()
        if dtype not in _FLOATS and kind != "alpha":
            raise ValueError(f"{where}{shown(key)} holds {dtype} numbers; the weights of a LoRA are floating-point")
        if kind in WEIGHTS and len(shapes[kind]) != 2:
            raise ValueError(f"{where}{shown(key)} has shape {shapes[kind]}; the weights of a LoRA are matrices")
        if kind == "alpha" and dtype in _NO_ALPHA:
            raise ValueError(f"{where}{shown(key)} holds {dtype} numbers; an alpha is one real number")
        if kind == "alpha" and torch.Size(shapes[kind]).numel() != 1:
            raise ValueError(f"{where}{shown(key)} has shape {shapes[kind]}; an alpha is one number")
        if kind in MAGNITUDES and torch.Size(shapes[kind]).numel() != base.out_features:
            raise ValueError(
                f"{where}{shown(key)} has shape {shapes[kind]}; the layer has {base.out_features} outputs, each with one "
                "magnitude"
            )
    if {*MAGNITUDES} <= kinds.keys():
        raise ValueError(f"{where}{name} has both {' and '.join(MAGNITUDES)}: one DoRA has one of them")
    if is_lokr(kinds):
        if problem := misshapen(shapes, base.out_features, base.in_features):
            raise ValueError(f"{where}LoKr of {name} {problem}")
        return
    (rank, inputs), (outputs, rank_b) = shapes["lora_A"], shapes["lora_B"]
    if rank != rank_b:
        raise ValueError(f"{where}LoRA of {name}: lora_A has rank {rank}, lora_B has rank {rank_b}")
    if rank == 0:
        raise ValueError(f"{where}LoRA of {name} has rank 0: it is empty")
    if (outputs, inputs) != (base.out_features, base.in_features):
        raise ValueError(
            f"{where}LoRA of {name} is made for a {outputs}×{inputs} layer, but this model's is "
            f"{base.out_features}×{base.in_features}; it belongs to another model"
        )


def _scaled(path: Path, name: str, stored: Layer, adapter: AdapterMetadata) -> Layer:
    """The layer in float32 with its scale in lora_B. Raises ValueError for what is not finite."""
    layer = {kind: tensor.float() for kind, tensor in stored.items()}
    for kind, tensor in layer.items():
        if not tensor.isfinite().all():
            raise ValueError(
                f"{shown(path)}: {kind} of {name} has values that are NaN or infinite: its training failed, or the file "
                "is damaged"
            )
    if adapter.dora and not layer.keys() & {*MAGNITUDES}:
        raise ValueError(
            f"{shown(path)}: its header says use_dora, but there are no magnitudes of {name}: it is incomplete"
        )
    rank, alpha = rank_of(layer), layer.pop("alpha", None)
    scale = adapter.scale(name, rank) if alpha is None else alpha.item() / rank if rank else 1.0
    if alpha is not None and adapter.present and not math.isclose(scale, adapter.scale(name, rank), rel_tol=1e-2):
        raise ValueError(
            f"{shown(path)}: the alpha of {name} makes its scale {scale:g}, the header {adapter.scale(name, rank):g}: which "
            "one counts is not known"
        )
    kind = next(kind for kind in SCALED if kind in layer)
    layer[kind] = layer[kind] * scale
    if not layer[kind].isfinite().all():
        raise ValueError(f"{shown(path)}: {kind} of {name} times its scale {scale:g} is no longer finite")
    if "lora_magnitude_vector" in layer:
        layer["lora_magnitude_vector"] = layer["lora_magnitude_vector"].flatten()
    if "dora_scale" in layer:
        layer["dora_scale"] = layer["dora_scale"].reshape(-1, 1)
    return layer
