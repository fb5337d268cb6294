"""What ComfyUI does with a LoRA file of Qwen-Image, by its rules and its formula, since it is no package.

From ComfyUI v0.3.77: comfy/lora.py (model_lora_keys_unet, load_lora) for the names, comfy/weight_adapter/lora.py, lokr.py and
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


@dataclass
class LokrPatch:
    """One layer's part of a LoKr: LoKrAdapter.load and calculate_weight of a linear layer."""

    weights: dict[str, torch.Tensor]
    alpha: float | None

    def applied(self, weight: torch.Tensor, strength: float = 1.0) -> torch.Tensor:
        """The layer's weight with the LoKr in it."""
        w1, w2, dim = self.weights.get("lokr_w1"), self.weights.get("lokr_w2"), None
        if w1 is None:
            dim = self.weights["lokr_w1_b"].shape[0]
            w1 = torch.mm(self.weights["lokr_w1_a"].float(), self.weights["lokr_w1_b"].float())
        if w2 is None:
            dim = self.weights["lokr_w2_b"].shape[0]
            w2 = torch.mm(self.weights["lokr_w2_a"].float(), self.weights["lokr_w2_b"].float())
        alpha = self.alpha / dim if self.alpha is not None and dim is not None else 1.0
        update = torch.kron(w1.float(), w2.float()).reshape(weight.shape)
        return weight + strength * alpha * update


LOKR = ("lokr_w1", "lokr_w2", "lokr_w1_a", "lokr_w1_b", "lokr_w2_a", "lokr_w2_b")


def load(state: dict[str, torch.Tensor], layers: Iterable[str]) -> tuple[dict[str, Patch | LokrPatch], list[str]]:
    """Patch by layer name, and the keys that it would report as "lora key not loaded"."""
    patches: dict[str, Patch | LokrPatch] = {}
    loaded = set()
    for layer in layers:
        flat = layer.replace(".", "_")
        for name in (f"lora_unet_{flat}", f"diffusion_model.{layer}", layer, f"transformer.{layer}", f"lycoris_{flat}"):
            if found := {kind: state[f"{name}.{kind}"] for kind in LOKR if f"{name}.{kind}" in state}:
                alpha = state.get(f"{name}.alpha")
                loaded |= {f"{name}.{kind}" for kind in (*found, "alpha")}
                patches[layer] = LokrPatch(found, None if alpha is None else alpha.item())
            for up, down in PAIRS:
                if name + up not in state:
                    continue
                alpha, dora = state.get(f"{name}.alpha"), state.get(f"{name}.dora_scale")
                loaded |= {name + up, name + down, f"{name}.alpha", f"{name}.dora_scale"}
                patches[layer] = Patch(state[name + up], state[name + down], alpha and alpha.item(), dora)
                break
    return patches, [key for key in state if key not in loaded]
