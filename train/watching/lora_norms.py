"""How large the LoRA is, group by group (attention, mlp, modulation; image and text stream): are all of them learning?

`weight_norm/GROUP` is the norm of all lora_A and lora_B of a group (and a DoRA's magnitudes), `update_norm/GROUP` that of
what they add to the base, ‖scale · B·A‖ over all its layers. Frobenius norms. The second needs no product of the layers' size:

    ‖B·A‖² = tr(Aᵀ BᵀB A) = Σ (BᵀB) ∘ (AAᵀ)
"""

from collections.abc import Sequence

import torch
from torch import nn

from qwen_image.out_of_memory import memory_ran_out
from train.lora.inject import lora_parameters
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
        alike: dict[tuple[int, torch.Size, torch.Size], list[tuple[nn.Parameter, nn.Parameter]]] = {}
        for layer in layers:
            pair = parameters[f"{layer}.lora_A"], parameters[f"{layer}.lora_B"]
            key = self.groups.index(group_of(layer)), pair[0].shape, pair[1].shape
            alike.setdefault(key, []).append(pair)
        self.chunks = [
            (group, pairs[first : first + TOGETHER])
            for (group, _, _), pairs in alike.items()
            for first in range(0, len(pairs), TOGETHER)
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
        return self.of_chunks @ torch.stack([self.scale**2 * update_square(pairs) for _, pairs in self.chunks])


def update_square(pairs: Sequence[tuple[torch.Tensor, torch.Tensor]]) -> torch.Tensor:
    """Σ ‖B·A‖² over pairs of A [r, in] and B [out, r] of one shape; float64, one element."""
    downs = torch.stack([down.detach() for down, _ in pairs]).float()
    ups = torch.stack([up.detach() for _, up in pairs]).float()
    products = (ups.transpose(1, 2) @ ups).double() * (downs @ downs.transpose(1, 2)).double()
    return products.sum().clamp(min=0)
