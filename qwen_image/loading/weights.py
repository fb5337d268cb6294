"""From safetensors files to the weights of a module that was built empty, on the meta device.

    transformer = empty_transformer(files)                                    # shapes, no memory
    load_weights(transformer, files["transformer"].weights, torch.bfloat16, "cuda")

The headers say whether names and shapes are the module's before any weight is read; then each parameter is made where it
shall stay, so no second copy of the model ever exists.
"""

from collections.abc import Iterator
from pathlib import Path

import torch
from torch import nn

from files.shown import shown
from qwen_image.loading.model_files import ModelFiles, transformer_config
from qwen_image.loading.safetensors_ranges import RangeReader, StoredTensor, read_headers, single_file_prefix
from qwen_image.model.transformer import QwenImageTransformer


def empty_transformer(files: ModelFiles) -> QwenImageTransformer:
    """The transformer of `files` on the meta device. Raises what `transformer_config` does."""
    with torch.device("meta"):
        return QwenImageTransformer(transformer_config(files))


def stream_tensors(files: tuple[Path, ...], device: torch.device | str = "cpu") -> Iterator[tuple[str, torch.Tensor]]:
    """(name, tensor) of every tensor, one at a time, single-file prefixes removed; on the CPU views of the mapped file."""
    from safetensors import SafetensorError, safe_open

    for path in files:
        try:
            with safe_open(path, framework="pt", device=str(device)) as file:
                names = list(file.keys())
                prefix = single_file_prefix(names)
                for name in names:
                    yield name.removeprefix(prefix), file.get_tensor(name)
        except SafetensorError as error:
            raise ValueError(f"{path} is no readable safetensors file ({error}); download it again") from error


def load_weights(
    module: nn.Module,
    files: tuple[Path, ...],
    dtype: torch.dtype,
    device: torch.device | str = "cpu",
    progress: bool = False,
) -> None:
    """Fill a module built on the meta device from safetensors, cast and moved piece by piece; freezes all.

    Peak memory is the model plus a few pieces of 16 MiB. Raises ValueError when names or shapes are another model's,
    before any weight is read.
    """
    stored = match_weights(module, files)
    total = sum(tensor.numel * tensor.dtype.itemsize for tensor in stored.values())
    with RangeReader(progress, total) as reader:
        for name, tensor in stored.items():
            values = torch.empty(tensor.shape, dtype=dtype, device=device)
            replace_parameter(module, name, nn.Parameter(values, requires_grad=False))
            reader.read(tensor, values)


def match_weights(module: nn.Module, files: tuple[Path, ...]) -> dict[str, StoredTensor]:
    """Where each parameter of `module` lies in `files`, in the files' order; reads headers alone.

    Raises ValueError when a file is damaged, or names or shapes are another model's.
    """
    expected = {name: parameter.shape for name, parameter in module.named_parameters()}
    stored = read_headers(files)
    for name, tensor in stored.items():
        if name in expected and tensor.shape != expected[name]:
            raise ValueError(
                f"{files[0].parent}: {name} has shape {list(tensor.shape)}, but the configuration says "
                f"{list(expected[name])}; configuration and weights belong to different models"
            )
    missing, unexpected = sorted(expected.keys() - stored.keys()), [name for name in stored if name not in expected]
    if missing or unexpected:
        raise ValueError(
            f"{files[0].parent}: these weights are not this model's: {len(missing)} tensors missing"
            + (f" (first {shown(missing[0])})" if missing else "")
            + f", {len(unexpected)} unknown"
            + (f" (first {shown(unexpected[0])})" if unexpected else "")
        )
    return stored


def replace_parameter(module: nn.Module, name: str, parameter: nn.Parameter) -> None:
    """Put `parameter` where `name` says; a parameter on the meta device can't be filled in place."""
    parent, _, leaf = name.rpartition(".")
    setattr(module.get_submodule(parent), leaf, parameter)
