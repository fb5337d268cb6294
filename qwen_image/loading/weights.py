"""From safetensors files to the weights of a module that was built empty, on the meta device.

    transformer = empty_transformer(files)                                    # shapes, no memory
    load_weights(transformer, files["transformer"].weights, torch.bfloat16, "cuda")

The headers say whether names and shapes are the module's before any weight is read; then each parameter is made where it
shall stay, so no second copy of the model ever exists.
"""

from collections.abc import Callable
from pathlib import Path

import torch
from torch import nn

from files.shown import shown
from qwen_image.loading.float8_scales import attach_scales, unscaled
from qwen_image.loading.model_files import TIMESTEP_ZERO, ModelFiles, transformer_config
from qwen_image.loading.safetensors_ranges import RangeReader, StoredTensor, read_headers
from qwen_image.model.sizes import TransformerConfig
from qwen_image.model.transformer import QwenImageTransformer

Rename = Callable[[str], str | None]
Room = Callable[[str, torch.Size], torch.Tensor | None]


def empty_transformer(files: ModelFiles) -> QwenImageTransformer:
    """The transformer of `files` on the meta device. Raises what `transformer_config` does."""
    with torch.device("meta"):
        return QwenImageTransformer(transformer_config(files))


def full_size_transformer() -> QwenImageTransformer:
    """Qwen-Image's own transformer (20 B parameters) on the meta device, where its files aren't at hand."""
    with torch.device("meta"):
        return QwenImageTransformer(TransformerConfig())


def load_weights(
    module: nn.Module,
    files: tuple[Path, ...],
    dtype: torch.dtype,
    device: torch.device | str = "cpu",
    progress: bool = False,
    rename: Rename | None = None,
    unscaled_float8: bool = False,
    room: Room | None = None,
) -> None:
    """Fill a module built on the meta device from safetensors, cast and moved piece by piece; freezes all.

    `room` gives the memory that a parameter of that name and shape is to have, or None for any on `device`.

    Peak memory is the model plus a few pieces of 16 MiB. Arguments and errors are those of `match_weights`, raised before
    any weight is read; ValueError also for values that are not finite.
    """
    stored = match_weights(module, files, rename, unscaled_float8)
    total = sum(tensor.numel * tensor.dtype.itemsize for tensor in stored.values())
    with RangeReader(progress, total) as reader:
        for name, tensor in stored.items():
            values = None if room is None else room(name, tensor.shape)
            if values is None:
                values = torch.empty(tensor.shape, dtype=dtype, device=device)
            replace_parameter(module, name, nn.Parameter(values, requires_grad=False))
            reader.read(tensor, values)


def match_weights(
    module: nn.Module, files: tuple[Path, ...], rename: Rename | None = None, unscaled_float8: bool = True
) -> dict[str, StoredTensor]:
    """Where each parameter of `module` lies in `files`, in the files' order; reads headers and float8 scales alone.

    Args:
        rename: the file's name of a tensor → the module's, or None for one that belongs to a part that is not loaded.
        unscaled_float8: take float8 weights without scales, which lost precision (`float8_warning` tells).

    Raises ValueError when a file is damaged, names, shapes or types are another model's, or a float8 scale is missing.
    """
    expected = {name: parameter.shape for name, parameter in module.named_parameters()}
    stored = _renamed(attach_scales(read_headers(files)), rename)
    stored.pop(TIMESTEP_ZERO, None)
    where = shown(files[0].parent if len(files) > 1 else files[0])
    for name, tensor in stored.items():
        if name in expected and tensor.shape != expected[name]:
            raise ValueError(
                f"{where}: {shown(tensor.name)} has shape {list(tensor.shape)}, but the configuration says "
                f"{list(expected[name])}; configuration and weights belong to different models"
            )
    missing, unexpected = sorted(expected.keys() - stored.keys()), [name for name in stored if name not in expected]
    if missing or unexpected:
        raise ValueError(
            f"{where}: these weights are not this model's: {len(missing)} tensors missing"
            + (f" (first {shown(missing[0])})" if missing else "")
            + f", {len(unexpected)} unknown"
            + (f" (first {shown(stored[unexpected[0]].name)})" if unexpected else "")
        )
    for tensor in stored.values():
        if not tensor.dtype.is_floating_point:
            raise ValueError(
                f"{where}: {shown(tensor.name)} holds {str(tensor.dtype).removeprefix('torch.')} numbers: a quantized file of "
                "another program, which is not read; use the bfloat16 file"
            )
    rounded = unscaled(stored.values())
    if rounded is not None and not unscaled_float8:
        raise ValueError(
            f"{where}: {shown(rounded.name)} is float8 without a scale, so its values are lost or off: use the bfloat16 file, "
            "or one with scales"
        )
    return stored


def _renamed(stored: dict[str, StoredTensor], rename: Rename | None) -> dict[str, StoredTensor]:
    if rename is None:
        return stored
    found: dict[str, StoredTensor] = {}
    for name, tensor in stored.items():
        own = rename(name)
        if own is None:
            continue
        if own in found:
            raise ValueError(
                f"{shown(tensor.path)}: {shown(found[own].name)} and {shown(tensor.name)} are two spellings of one weight"
            )
        found[own] = tensor
    return found


def float8_warning(files: ModelFiles) -> list[str]:
    """A line for people when the transformer's file is float8 without scales; reads headers alone."""
    rounded = unscaled(attach_scales(read_headers(files["transformer"].weights)).values())
    if rounded is None:
        return []
    return [
        f"warning: {shown(rounded.path)} holds float8 weights without scales: every weight has lost precision for good "
        "(2 or 3 bits of mantissa are left); the bfloat16 file is better, and takes as little with --base_precision float8"
    ]


def replace_parameter(module: nn.Module, name: str, parameter: nn.Parameter) -> None:
    """Put `parameter` where `name` says; a parameter on the meta device can't be filled in place."""
    parent, _, leaf = name.rpartition(".")
    setattr(module.get_submodule(parent), leaf, parameter)
