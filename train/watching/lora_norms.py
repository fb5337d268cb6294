"""How large the LoRA is, group by group (attention, mlp, modulation; image and text stream): are all of them learning?

`weight_norm/GROUP` is the norm of all lora_A and lora_B of a group (and a DoRA's magnitudes), `update_norm/GROUP` that of
what they add to the base, ‖scale · B·A‖ over all its layers. Frobenius norms. The second needs no product of the layers' size:

    ‖B·A‖² = tr(Aᵀ BᵀB A) = Σ (BᵀB) ∘ (AAᵀ)          of a LoKr ‖w1 ⊗ w2‖ = ‖w1‖ · ‖w2‖
"""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import nn

from qwen_image.out_of_memory import memory_ran_out
from train.lora.inject import lora_parameters
from train.lora.lokr import W1, W2
from train.lora.lora_file import WEIGHTS
from train.lora.targets import group_of
from train.watching.late_row import Part

TOGETHER = 64  # layers of one shape whose small products are one launch


class LoraNorms:
    """The norms of a model's LoRA, whose weights are whole on this rank; a few fused launches each time."""

    def __init__(self, transformer: nn.Module, scale: float) -> None:
        self.scale = scale
        self.off = ""
        parameters = lora_parameters(transformer)
        layers = dict.fromkeys(name.rpartition(".")[0] for name in parameters)
        self.groups = list(dict.fromkeys(group_of(layer) for layer in layers))
        self.weights = list(parameters.values())
        device = self.weights[0].device
        self.of_weights = self._membership([group_of(name.rpartition(".")[0]) for name in parameters], device)
        alike: dict[tuple[Any, ...], list[dict[str, nn.Parameter]]] = {}
        for layer in layers:
            own = {kind: parameters[name] for kind in WEIGHTS if (name := f"{layer}.{kind}") in parameters}
            key = self.groups.index(group_of(layer)), *((kind, weight.shape) for kind, weight in own.items())
            alike.setdefault(key, []).append(own)
        self.chunks = [
            (int(group), alike_layers[first : first + TOGETHER])
            for (group, *_), alike_layers in alike.items()
            for first in range(0, len(alike_layers), TOGETHER)
        ]
        self.of_chunks = self._membership([self.groups[group] for group, _ in self.chunks], device)

    def _membership(self, groups: Sequence[str], device: torch.device) -> torch.Tensor:
        """1 where an entry belongs to a group, float64 [groups, entries]: times squares, it gives the groups' sums."""
        mine = [[float(group == each) for each in groups] for group in self.groups]
        return torch.tensor(mine, dtype=torch.float64, device=device)

    @torch.no_grad()
    def row(self) -> Part | None:
        """For a row of metrics; None where there is no memory for it, for good (`off` says so). Waits for nothing."""
        if self.off:
            return None
        try:
            numbers = torch.cat([self._weights(), self._updates()]).sqrt()
        except RuntimeError as error:
            if not memory_ran_out(error):
                raise
            self.off = "the norms of the LoRA are left out of the metrics: there is no memory for them"
            return None
        names = [group.replace(", ", "_") for group in self.groups]
        names = [f"{kind}_norm/{name}" for kind in ("weight", "update") for name in names]
        return Part(numbers, lambda found: dict(zip(names, found, strict=True)))

    def _weights(self) -> torch.Tensor:
        """Squares of the groups' norms, float64 [groups]."""
        norms = torch.stack(torch._foreach_norm([weight.detach() for weight in self.weights], 2.0, dtype=torch.float32))
        return self.of_weights @ norms.double().square()

    def _updates(self) -> torch.Tensor:
        return self.of_chunks @ torch.stack([self.scale**2 * update_square(layers) for _, layers in self.chunks])


def update_square(layers: Sequence[Mapping[str, torch.Tensor]]) -> torch.Tensor:
    """Σ ‖ΔW‖² over layers with the same kinds of weights, of the same shapes, the scale left out; float64, one element."""
    together = {kind: torch.stack([layer[kind].detach() for layer in layers]).float() for kind in layers[0]}
    if "lora_A" in together:
        return product_squares(together["lora_B"], together["lora_A"]).sum()
    first, second = (
        together[name].double().square().sum((1, 2))
        if name in together
        else product_squares(together[f"{name}_a"], together[f"{name}_b"])
        for name in (W1, W2)
    )
    return (first * second).sum()


def product_squares(ups: torch.Tensor, downs: torch.Tensor) -> torch.Tensor:
    """‖B·A‖² of each B [out, r] and A [r, in] of ups [n, out, r] and downs [n, r, in]; float64 [n]."""
    products = (ups.transpose(1, 2) @ ups).double() * (downs @ downs.transpose(1, 2)).double()
    return products.sum((1, 2)).clamp(min=0)
