"""Model files with weights in 8 bits (float8): each weight's scale beside it, as ComfyUI and others write them.

A float8 number has 2 or 3 bits of mantissa and ends at 448 (e4m3), so a weight is divided by a scale before it is rounded:
w ≈ q · scale, with one scale a tensor or one a row (output). Names: `x.scale_weight` and a mark `scaled_fp8` (ComfyUI's
`qwen_2.5_vl_7b_fp8_scaled`), `x.weight_scale` (its newer files), `x.weight_scale_inv` (DeepSeek's name; multiplied, too).
"""

from collections.abc import Iterable
from dataclasses import replace

import torch

from files.shown import shown
from qwen_image.loading.safetensors_ranges import StoredTensor, read_whole

FLOAT8 = (torch.float8_e4m3fn, torch.float8_e5m2)
SCALES = ("scale_weight", "weight_scale", "weight_scale_inv")
ASIDE = ("scale_input", "input_scale", "comfy_quant")  # of activations, and notes: nothing that a weight needs
MARK = "scaled_fp8"


def attach_scales(stored: dict[str, StoredTensor]) -> dict[str, StoredTensor]:
    """The same tensors without those of scales, which the weights now carry (`StoredTensor.scale`); reads the scales.

    Raises ValueError when scales are there for some float8 weights and not for others, or have another form.
    """
    weights = {name: tensor for name, tensor in stored.items() if tensor.dtype in FLOAT8 and name != MARK}
    scales = {name: _scale_of(name, stored) for name in weights}
    scaled = any(scale is not None for scale in scales.values()) or MARK in stored
    missing = [name for name, scale in scales.items() if scale is None]
    if scaled and missing:
        raise ValueError(
            f"{shown(weights[missing[0]].path)}: {shown(missing[0])} is scaled float8, but its scale is not in the file: "
            "download it again, or use the bfloat16 file"
        )
    found = {}
    for name, tensor in stored.items():
        stem, _, last = name.rpartition(".")
        if name == MARK or (last in SCALES + ASIDE and f"{stem}.weight" in weights):
            continue
        scale = scales.get(name)
        found[name] = tensor if scale is None else replace(tensor, scale=_values(scale, tensor))
    return found


def unscaled(stored: Iterable[StoredTensor]) -> StoredTensor | None:
    """The first float8 weight without a scale: a bfloat16 weight that was rounded to 8 bits as it was."""
    return next((tensor for tensor in stored if tensor.dtype in FLOAT8 and tensor.scale is None), None)


def _scale_of(name: str, stored: dict[str, StoredTensor]) -> StoredTensor | None:
    stem = name.removesuffix(".weight")
    return next((stored[f"{stem}.{scale}"] for scale in SCALES if f"{stem}.{scale}" in stored), None)


def _values(scale: StoredTensor, weight: StoredTensor) -> torch.Tensor:
    rows = weight.shape[0] if weight.shape else 1
    if not scale.dtype.is_floating_point or scale.numel not in (1, rows):
        raise ValueError(
            f"{shown(scale.path)}: {shown(scale.name)} has shape {list(scale.shape)}; read are scales with one number, or "
            f"with one for each of the {rows} rows: use the bfloat16 file"
        )
    return read_whole(scale, torch.float32)
