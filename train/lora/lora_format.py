"""How programs spell the weights of a LoRA file (`--lora_format`, train/convert_lora.py), and what a foreign key is.

Written are four spellings; read are these and their mixtures, with the endings in ENDINGS and the prefixes in PREFIXES.
Which program reads which stands in docs/lora_files.md.

A LoKr has LyCORIS's endings (KINDS in train/lora/lokr.py) behind the same prefixes. ComfyUI looks for them under every name
that it has for a layer: `diffusion_model.<layer>`, `transformer.<layer>`, `<layer>`, `lora_unet_<flat>`, `lycoris_<flat>`
(comfy/lora.py, model_lora_keys_unet, QwenImage; load_lora), and adds (comfy/weight_adapter/lokr.py, calculate_weight)

    strength · alpha/dim · w1 ⊗ w2        dim: the rank of w2, or where w2 is whole that of w1

where both are whole, or there is no alpha, alpha/dim is 1. So does LyCORIS (lycoris/modules/lokr.py: both whole, then alpha is
the dim). diffusers 0.42 reads `transformer.<layer>` and takes alpha for the dim (loaders/peft.py, _create_lokr_config).
"""

import re
from dataclasses import dataclass

from torch import nn

from train.lora.lokr import KINDS

_ADAPTER = re.compile(r"\.(lora_[AB])\.[^.]+\.weight$|\.(lora_magnitude_vector)\.(?!weight$)[^.]+(\.weight)?$")
_LOKR_ADAPTER = re.compile(r"\.(lokr_w[12](_[ab])?)\.[^.]+$")


@dataclass(frozen=True)
class Spelling:
    """`prefix`, the layer's name (flat: dots as underscores), an ending for each kind of weight."""

    prefix: str
    endings: dict[str, str]
    flat: bool = False

    def key(self, layer: str, kind: str) -> str:
        return self.prefix + (layer.replace(".", "_") if self.flat else layer) + self.endings[kind]


_HALVES = {"lora_A": ".lora_A.weight", "lora_B": ".lora_B.weight"}
_LOKR = {kind: f".{kind}" for kind in KINDS}
SPELLINGS = {
    "diffusers": Spelling("transformer.", _HALVES | {"lora_magnitude_vector": ".lora_magnitude_vector"} | _LOKR),
    "comfyui": Spelling("diffusion_model.", _HALVES | {"dora_scale": ".dora_scale"} | _LOKR),
    "diffsynth": Spelling("", {"lora_A": ".lora_A.default.weight", "lora_B": ".lora_B.default.weight"}),
    "kohya": Spelling(
        "lora_unet_", {"lora_A": ".lora_down.weight", "lora_B": ".lora_up.weight", "alpha": ".alpha"} | _LOKR, flat=True
    ),
}
PREFIXES = ("transformer.", "diffusion_model.", "model.diffusion_model.", "lora_unet_", "lora_transformer_", "lycoris_")
ENDINGS = {
    ".lora_A.weight": "lora_A",
    ".lora_B.weight": "lora_B",
    ".lora_down.weight": "lora_A",
    ".lora_up.weight": "lora_B",
    ".lora.down.weight": "lora_A",
    ".lora.up.weight": "lora_B",
    ".lora_linear_layer.down.weight": "lora_A",
    ".lora_linear_layer.up.weight": "lora_B",
    ".alpha": "alpha",
    ".lora_magnitude_vector": "lora_magnitude_vector",
    ".lora_magnitude_vector.weight": "lora_magnitude_vector",
    ".dora_scale": "dora_scale",
    **{ending: kind for kind, ending in _LOKR.items()},
}
TEXT_ENCODER = re.compile(r"(text_encoders?|te)\d?[._]|lora_(te|text_encoder|prior_te)\d?_|text_model\.|clip_[gl]\.")
_MERGE = "merge it into the base with the program that made it, and use that as --transformer_path"
REASONS = (  # of a key that is no weight of a LoRA; the first that matches
    (
        r"^base_model\.model\.",
        "this is PEFT's own adapter file, whose scale stands in adapter_config.json beside it and not in the file: "
        "write it again with diffusers' save_lora_weights",
    ),
    (r"\.hada_", f"this is a LoHa (Hadamard products), and only LoRA, DoRA and LoKr are read: {_MERGE}"),
    (r"\.(oft|boft)_", f"this is an OFT, and only LoRA, DoRA and LoKr are read: {_MERGE}"),
    (r"\.[ab][12]\.weight$", f"this is a GLoRA, and only LoRA, DoRA and LoKr are read: {_MERGE}"),
    (r"\.row_offset$", f"rows of a LoKr over joined projections, which this model has one by one: {_MERGE}"),
    (
        r"\.lora_mid|\.lokr_t[12]$",
        f"a third matrix (Tucker, LoCon) belongs to a convolution, which this model has not: {_MERGE}",
    ),
    (
        r"\.(diff|diff_b|w_norm|b_norm|set_weight|reshape_weight)$",
        f"this is a whole weight's difference, not a product of low rank: {_MERGE}",
    ),
    (r"\.lora_\w+(\.\w+)?\.bias$|\.lora\.\w+\.bias$", f"a LoRA with a bias (PEFT's lora_bias) is not read: {_MERGE}"),
    (
        r"(scale_weight|weight_scale|scale_input|input_scale|scaled_fp8|comfy_quant)$",
        "scaled float8 weights are not read in a LoRA: use its bfloat16 or float16 file",
    ),
)


def adaptable_layers(transformer: nn.Module) -> dict[str, str]:
    """Every spelling of every linear layer's name (dotted and flat) → its name; those of an attached LoRA not."""
    linear = [name for name, module in transformer.named_modules() if isinstance(module, nn.Linear)]
    names = [name.removesuffix(".base_layer") for name in linear if ".lora_" not in name]
    return {name: name for name in names} | {name.replace(".", "_"): name for name in names}


def split_key(key: str) -> tuple[str, str | None]:
    """`transformer.a.b.lora_A.weight` → (`a.b`, `lora_A`); the kind is None for what is no weight of a LoRA."""
    for prefix in PREFIXES:
        if key.startswith(prefix):
            key = key[len(prefix) :]
            break
    key = _ADAPTER.sub(lambda found: f".{found[1] or found[2]}.weight", key)  # PEFT puts the adapter's name there
    key = _LOKR_ADAPTER.sub(r".\1", key)
    for ending in sorted(ENDINGS, key=len, reverse=True):
        if key.endswith(ending):
            return key.removesuffix(ending), ENDINGS[ending]
    return key, None


def why_not(key: str) -> str:
    """For people: why `key`, which names no layer and kind of weight that fit, is no LoRA weight."""
    for pattern, reason in REASONS:
        if re.search(pattern, key):
            return reason
    if split_key(key)[1] is not None:
        return "no LoRA weight of a layer that this transformer has; the file belongs to another model"
    if "lora" not in key and key.endswith((".weight", ".bias")):
        return "a weight of a whole model, not of a LoRA; a transformer's file goes to --transformer_path"
    return "no LoRA weight of a layer that this transformer has, nor of any kind that is known here"
