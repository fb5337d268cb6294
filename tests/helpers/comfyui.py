"""What ComfyUI does with a LoRA file of Qwen-Image, by its rules and its formula, since it is no package.

From ComfyUI v0.3.77: comfy/lora.py (model_lora_keys_unet, load_lora) for the names, comfy/weight_adapter/lora.py and
base.py (weight_decompose) for the arithmetic, in float32 as its model patcher computes it.
"""

from collections.abc import Iterable
from dataclasses import dataclass

import torch

PAIRS = (  # ending of the up matrix, of the down matrix; the first that is there counts
    (".lora_up.weight", ".lora_down.weight"),
    ("_lora.up.weight", "_lora.down.weight"),
    (".lora_B.weight", ".lora_A.weight"),
    (".lora.up.weight", ".lora.down.weight"),
    (".lora_B", ".lora_A"),
    (".lora_linear_layer.up.weight", ".lora_linear_layer.down.weight"),
    (".lora_B.default.weight", ".lora_A.default.weight"),
)


@dataclass
class Patch:
    """One layer's part of a LoRA."""

    up: torch.Tensor
    down: torch.Tensor
    alpha: float | None
    dora_scale: torch.Tensor | None

    def applied(self, weight: torch.Tensor, strength: float = 1.0) -> torch.Tensor:
        """The layer's weight with the LoRA in it."""
        scale = 1.0 if self.alpha is None else self.alpha / len(self.down)
        update = self.up.float() @ self.down.float()
        if self.dora_scale is None:
            return weight + strength * scale * update
        merged = weight + scale * update
        if self.dora_scale.shape[0] == len(weight):  # by output, the newer branch
            length = weight.norm(dim=1, keepdim=True)
        else:
            length = merged.norm(dim=0, keepdim=True)
        merged = merged * (self.dora_scale.float() / (length + torch.finfo(weight.dtype).eps))
        return merged if strength == 1 else weight + strength * (merged - weight)


def load(state: dict[str, torch.Tensor], layers: Iterable[str]) -> tuple[dict[str, Patch], list[str]]:
    """Patch by layer name, and the keys that it would report as "lora key not loaded"."""
    patches, loaded = {}, set()
    for layer in layers:
        flat = layer.replace(".", "_")
        for name in (f"lora_unet_{flat}", f"diffusion_model.{layer}", layer, f"transformer.{layer}", f"lycoris_{flat}"):
            for up, down in PAIRS:
                if name + up not in state:
                    continue
                alpha, dora = state.get(f"{name}.alpha"), state.get(f"{name}.dora_scale")
                loaded |= {name + up, name + down, f"{name}.alpha", f"{name}.dora_scale"}
                patches[layer] = Patch(state[name + up], state[name + down], alpha and alpha.item(), dora)
                break
    return patches, [key for key in state if key not in loaded]
