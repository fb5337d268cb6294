"""Merge LoRAs into the base: a whole transformer in the Hugging Face layout, which diffusers and this project load.

    python train/merge_lora.py --model Qwen/Qwen-Image --lora style.safetensors --output_path merged/transformer
    python train/merge_lora.py --model MODEL --lora a.safetensors:0.8 --lora b.safetensors:0.5 --output_path MERGED

MERGED receives config.json and the weights, in the base's dtype (float8: in bfloat16). Use it as `--transformer_path MERGED`
here, or as `QwenImageTransformer2DModel.from_pretrained("MERGED")` in diffusers. One tensor is in memory at a time.
"""

import argparse
import json
import os
import shutil
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from files.atomic_files import whole_file, whole_folder, write_file
from files.shown import one_line, tolerant_output
from qwen_image.loading.model_flags import add_model_flags

if TYPE_CHECKING:
    import torch

    from qwen_image.loading.model_files import ModelFiles
    from qwen_image.loading.safetensors_ranges import StoredTensor
    from train.lora.preset_loras import Preset

FILE_BYTES = 5_000_000_000  # of one weight file, as diffusers splits them
STEM = "diffusion_pytorch_model"


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_model_flags(parser, "transformer")
    parser.add_argument(
        "--lora",
        action="append",
        required=True,
        metavar="FILE[:WEIGHT]",
        help="LoRA file or run folder; repeat for more",
    )
    parser.add_argument("--output_path", type=Path, required=True, help="folder to make; must not exist")
    options = parser.parse_args(argv)
    tolerant_output()
    try:
        files, size = merge(
            options.model,
            options.lora,
            options.output_path,
            options.revision,
            options.transformer_path,
            model_family=options.model_family,
        )
    except (ValueError, OSError) as error:
        print(f"error: {one_line(error)}", file=sys.stderr)
        return 2
    print(f"wrote {options.output_path}: {files} weight files, {size / 1e9:.2f} GB")
    return 0


def merge(
    model: str,
    loras: Sequence[str],
    output_path: Path,
    revision: str | None = None,
    transformer_path: str | None = None,
    file_bytes: int = FILE_BYTES,
    model_family: str | None = None,
) -> tuple[int, int]:
    """Write base + LoRAs (`FILE` or `FILE:WEIGHT`) to `output_path`; returns the number of weight files and their bytes.

    The folder appears when it is complete. Raises ValueError for a LoRA of another model, FileNotFoundError for what is
    missing, FileExistsError, and OSError when the disk has too little room.
    """
    from qwen_image.loading.model_files import ModelSource, resolve_model
    from qwen_image.loading.weights import empty_transformer, float8_warning, match_weights
    from train.lora.preset_loras import Preset

    if os.path.lexists(output_path):
        raise FileExistsError(f"output_path: {output_path} exists already")
    found = resolve_model(ModelSource(model, revision, model_family, transformer_path), ("transformer",))
    component = found["transformer"]
    transformer = empty_transformer(found)
    stored = match_weights(transformer, component.weights)
    presets = [Preset.read(text, transformer) for text in loras]
    for note in [*float8_warning(found), *(note for preset in presets for note in preset.notes(found.member))]:
        print(one_line(note), file=sys.stderr)
    size = sum(byte_size(tensor) for tensor in stored.values())
    nearest = next(path for path in output_path.absolute().parents if path.exists())
    if shutil.disk_usage(nearest).free < size:
        raise OSError(f"output_path: the merged model needs {size / 1e9:.1f} GB, {nearest} has less room")
    metadata = {
        "format": "pt",
        "base_model": found.name,
        "base_model_revision": found.revision or "",
        "base_model_fingerprint": found.fingerprint("transformer"),
        "model_family": found.member.name,
        "merged_loras": json.dumps([{"file": p.path.name, **p.identity()} for p in presets]),
    }
    with whole_folder(output_path) as partial:
        write_file(partial / "config.json", config_of(found))
        groups = list(split(stored, file_bytes))
        weight_map: dict[str, str] = {}
        for number, names in enumerate(groups, start=1):
            part = f"-{number:05d}-of-{len(groups):05d}" if len(groups) > 1 else ""
            name = f"{STEM}{part}.safetensors"
            write_merged(partial / name, {n: stored[n] for n in names}, presets, metadata)
            weight_map |= dict.fromkeys(names, name)
        if len(groups) > 1:
            index = {"metadata": {"total_size": size}, "weight_map": weight_map}
            write_file(partial / f"{STEM}.safetensors.index.json", json.dumps(index, indent=2) + "\n")
    return len(groups), size


def config_of(files: "ModelFiles") -> bytes:
    """The transformer's config.json; what --model_family or a file's mark says beyond it is written into it."""
    content = (files["transformer"].folder / "config.json").read_bytes()
    config = json.loads(content)
    if bool(config.get("zero_cond_t")) == files.member.zero_cond_t:
        return content
    return json.dumps(config | {"zero_cond_t": files.member.zero_cond_t}, indent=2).encode() + b"\n"


def merged_dtype(tensor: "StoredTensor") -> "torch.dtype":
    """The base's own, but for float8, in which most of a LoRA's update would be rounded away: bfloat16."""
    import torch

    return torch.bfloat16 if tensor.dtype.itemsize == 1 else tensor.dtype


def byte_size(tensor: "StoredTensor") -> int:
    return tensor.numel * merged_dtype(tensor).itemsize


def split(stored: dict[str, "StoredTensor"], file_bytes: int) -> Iterator[list[str]]:
    """The tensors' names in their order, in groups of at most `file_bytes` (or of one tensor)."""
    group: list[str] = []
    filled = 0
    for name, tensor in stored.items():
        if group and filled + byte_size(tensor) > file_bytes:
            yield group
            group, filled = [], 0
        group.append(name)
        filled += byte_size(tensor)
    yield group


def write_merged(
    path: Path, stored: dict[str, "StoredTensor"], presets: "Sequence[Preset]", metadata: dict[str, str]
) -> None:
    """Write one safetensors file, tensor by tensor; those without a LoRA as they are."""
    from qwen_image.loading.safetensors_ranges import read_whole
    from qwen_image.loading.safetensors_writer import safetensors_blocks
    from train.lora.preset_loras import merged

    adapted = {f"{layer}.weight" for preset in presets for layer in preset.lora.layers}

    def values() -> "Iterator[torch.Tensor]":
        for name, tensor in stored.items():
            base = read_whole(tensor, merged_dtype(tensor))
            yield merged(base, name.removesuffix(".weight"), presets) if name in adapted else base

    layout = {name: (merged_dtype(tensor), tensor.shape) for name, tensor in stored.items()}
    with whole_file(path) as file:
        for block in safetensors_blocks(layout, values(), metadata):
            file.write(block)


if __name__ == "__main__":
    sys.exit(main())
