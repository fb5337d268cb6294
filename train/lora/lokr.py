"""LoKr: a layer's update as the Kronecker product of two small matrices (Yeh et al., arXiv:2309.14859, section 3.3).

    ΔW = scale · w1 ⊗ w2          w1 [a, c], w2 [b, d];  a·b outputs, c·d inputs;  ΔW[i·b + j, k·d + l] = w1[i, k] · w2[j, l]

Each factor is a whole matrix or a product of low rank: w1 = w1_a · w1_b, w2 = w2_a · w2_b. PEFT's LoKrLayer puts ΔW together
and multiplies with it, for each layer in each step: as much work as the base's own product, and its memory. Taken factor by
factor it is little. With an input as the matrix X [c, d] and the output as Y [a, b]:

    Y = scale · w1 · X · w2ᵀ

How other programs read the same names stands in train/lora/lora_format.py.
"""

from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import nn

from train.lora.spec import LoraSpec

KINDS = ("lokr_w1", "lokr_w1_a", "lokr_w1_b", "lokr_w2", "lokr_w2_a", "lokr_w2_b")
W1, W2 = "lokr_w1", "lokr_w2"
SCALED = ("lora_B", "lokr_w1", "lokr_w1_a")  # of a LoRA's or a LoKr's layer the one that its scale is multiplied into
Factors = Mapping[str, torch.Tensor]


def is_lokr(kinds: Any) -> bool:
    """Whether a layer with these kinds of weights is a LoKr's."""
    return any(kind in KINDS for kind in kinds)


def shapes(outputs: int, inputs: int, rank: int, factor: int, decompose_both: bool) -> dict[str, tuple[int, int]]:
    """Kind → shape of what PEFT's LoKrLayer (0.21, update_layer) has for a layer; that is LyCORIS's rule.

    `factor`: how many rows and columns w1 has at most, -1 for about the square root of the layer's; a size that it doesn't
    divide gets the nearest smaller divisor. A factor is of low rank where that is less than half its longer side, w1 only
    with `decompose_both`.
    """
    from peft.tuners.lokr.layer import factorization

    (a, b), (c, d) = factorization(outputs, factor), factorization(inputs, factor)
    found: dict[str, tuple[int, int]] = {}
    for name, rows, columns, may in ((W1, a, c, decompose_both), (W2, b, d, True)):
        if may and rank < max(rows, columns) / 2:
            found |= {f"{name}_a": (rows, rank), f"{name}_b": (rank, columns)}
        else:
            found[name] = (rows, columns)
    return found


def rank_lines(layers: Iterable[nn.Linear], spec: LoraSpec) -> list[str]:
    """For people, before step 0: where the rank has no effect, since w2 is whole."""
    if not spec.is_lokr:
        return []
    settings = spec.rank, spec.factor, spec.decompose_both
    found = [shapes(layer.out_features, layer.in_features, *settings) for layer in layers]
    sizes = [max(each[W2]) for each in found if W2 in each]
    if not sizes:
        return []
    return [
        f"lora_rank {spec.rank} is at least half of w2's longer side ({max(sizes)} at most) on {len(sizes)} of {len(found)} "
        "layers: w2 is whole there, and the rank only divides lora_alpha"
    ]


def whole(layer: Factors, name: str) -> torch.Tensor:
    """`lokr_w1` or `lokr_w2` of a layer as one matrix."""
    return layer[name] if name in layer else layer[f"{name}_a"] @ layer[f"{name}_b"]


def update_of(layer: Factors, device: torch.device) -> torch.Tensor:
    """ΔW [out, in] of a layer whose scale is in its weights: w1 ⊗ w2, or a LoRA's lora_B · lora_A; put together on `device`."""
    here = {kind: tensor.to(device) for kind, tensor in layer.items()}
    return torch.kron(whole(here, W1), whole(here, W2)) if is_lokr(here) else here["lora_B"] @ here["lora_A"]


def rank_of(layer: Factors) -> int | None:
    """The rank that an alpha is divided by, of a LoKr ComfyUI's and LyCORIS's `dim`; None where its factors are whole."""
    return next((len(layer[name]) for name in ("lora_A", "lokr_w2_b", "lokr_w1_b") if name in layer), None)


def incomplete(kinds: Collection[str]) -> str:
    """What is wrong with these kinds of weights as those of one layer, to follow its name; empty: nothing."""
    given = set(kinds)
    if not is_lokr(given):
        return "" if {"lora_A", "lora_B"} <= given else f"has only {', '.join(kinds)}; the file is incomplete"
    others = sorted(given - {*KINDS, "alpha"})
    if others:
        return f"has a LoKr and {', '.join(others)}: which one counts is not known"
    for name in (W1, W2):
        halves = given & {f"{name}_a", f"{name}_b"}
        if name in given and halves:
            return f"has {name} and {', '.join(sorted(halves))}: which one counts is not known"
        if name not in given and len(halves) < 2:
            return f"is a LoKr without a whole {name} (it has only {', '.join(kinds)}); the file is incomplete"
    return ""


def misshapen(sizes: Mapping[str, Sequence[int]], outputs: int, inputs: int) -> str:
    """What is wrong with the shapes of a LoKr's matrices for a layer, to follow its name; empty: nothing."""
    sides = []
    for name in (W1, W2):
        if name in sizes:
            sides.append(sizes[name])
            continue
        (rows, rank), (rank_b, columns) = sizes[f"{name}_a"], sizes[f"{name}_b"]
        if rank != rank_b:
            return f"has no product {name}: {name}_a has rank {rank}, {name}_b has rank {rank_b}"
        if rank == 0:
            return f"has rank 0 in {name}: it is empty"
        sides.append((rows, columns))
    (a, c), (b, d) = sides
    if (a * b, c * d) != (outputs, inputs):
        return (
            f"is made for a {a * b}×{c * d} layer ({a}×{c} by {b}×{d}), but this model's is {outputs}×{inputs}; it belongs to "
            "another model"
        )
    return ""


class _Product(torch.autograd.Function):
    """w1 · X · (up · down)ᵀ for each X [c, d] of x [n, c, d]; without `down`, `up` is all of w2.

    Of the activations x alone is kept for the backward pass, as a LoRA keeps it; what lies between is computed again.
    """

    @staticmethod
    def forward(
        ctx: Any, x: torch.Tensor, w1: torch.Tensor, up: torch.Tensor, down: torch.Tensor | None
    ) -> torch.Tensor:
        ctx.save_for_backward(x, w1, up, down)
        low = x if down is None else x @ down.t()
        return w1 @ (low @ up.t())

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> Any:
        (gradient,) = gradients  # [n, a, b]
        x, w1, up, down = ctx.saved_tensors
        low = x if down is None else x @ down.t()
        between = low @ up.t()  # [n, c, b]
        of_w1 = gradient.mT.flatten(0, 1).t() @ between.mT.flatten(0, 1)  # einsum takes several times as long
        of_between = w1.t() @ gradient
        of_up = of_between.flatten(0, 1).t() @ low.flatten(0, 1)
        of_low = of_between @ up if down is not None or ctx.needs_input_grad[0] else None
        if down is None or of_low is None:
            return of_low, of_w1, of_up, None
        of_down = of_low.flatten(0, 1).t() @ x.flatten(0, 1)
        return of_low @ down if ctx.needs_input_grad[0] else None, of_w1, of_up, of_down


def kronecker_linear(x: torch.Tensor, layer: Factors, scale: float) -> torch.Tensor:
    """x [..., in] → x · ΔWᵀ [..., out] with gradients for x and the layer's weights; x has their dtype."""
    w1 = whole(layer, W1)
    w1 = w1 if scale == 1 else w1 * scale
    up, down = (layer[W2], None) if W2 in layer else (layer["lokr_w2_a"], layer["lokr_w2_b"])
    columns = (up if down is None else down).shape[1]
    matrices = x.reshape(-1, w1.shape[1], columns)
    product = _Product.apply(matrices, w1, up, down)
    return product.reshape(*x.shape[:-1], w1.shape[0] * up.shape[0])


def check_start(name: str, layer: Factors, spec: LoraSpec) -> None:
    """Raise ValueError unless a LoKr's layer can stand in the weights that `spec` gives it."""
    (a, c), (b, d) = (tuple(whole(layer, factor).shape) for factor in (W1, W2))
    own = shapes(a * b, c * d, spec.rank, spec.factor, spec.decompose_both)
    rows, columns = own.get(W1) or (own[f"{W1}_a"][0], own[f"{W1}_b"][1])
    if (rows, columns) != (a, c):
        raise ValueError(
            f"lora_checkpoint's w1 is {a}×{c} on {name}, with lokr_factor {spec.factor} this run's is {rows}×{columns}: the "
            f"factors must be the same (lokr_factor {max(a, c)}?)"
        )
    for factor, flag in ((W1, "lokr_decompose_both false"), (W2, f"lora_rank {-(-max(b, d) // 2)}")):
        low = f"{factor}_b"
        if low in own and low not in layer:
            raise ValueError(
                f"lora_checkpoint has a whole {factor} on {name}, this run's is a product of rank {spec.rank}: say {flag}"
            )
        if low in own and len(layer[low]) > spec.rank:
            raise ValueError(
                f"lora_checkpoint has rank {len(layer[low])} on {name}, this run has lora_rank {spec.rank}: say at least "
                f"{len(layer[low])}"
            )


def start_layer(parameters: Mapping[str, nn.Parameter], name: str, layer: Factors, scale: float) -> None:
    """A layer of a LoKr file into fresh weights: where the run has a whole factor, a product of low rank is multiplied out."""
    for factor, by in ((W1, scale), (W2, 1.0)):
        if (own := parameters.get(f"{name}.{factor}")) is not None:
            own.data.copy_(whole(layer, factor) / by)
            continue
        first, second = parameters[f"{name}.{factor}_a"], parameters[f"{name}.{factor}_b"]
        rank = len(layer[f"{factor}_b"])
        first.data[:, :rank] = layer[f"{factor}_a"] / by
        second.data.zero_()  # what is left of the rank adds nothing, and learns from the other half
        second.data[:rank] = layer[f"{factor}_b"]
