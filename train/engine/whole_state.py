"""The state of a WholeOptimizer for checkpoints: by name, so that no layout of one run binds the next.

Kinds with a number for every weight (moments, Prodigy's start, schedule-free's z) are kinds as AdamW's are on its divided
vector; others (Adafactor's rows and columns, Muon's buffers where vectors are AdamW's) are tensors of their own shapes.
"""

from collections.abc import Callable, Mapping, Sequence

import torch

from train.engine.optimizer import restore_counters
from train.engine.whole_optimizer import WholeOptimizer

AVERAGE = (
    "average"  # the kind that is schedule-free's average x: made of y and z, saved for those who want the LoRA alone
)
# What an optimizer keeps in its parameter groups and changes with each step.
PROGRESS = {
    "prodigy": ("k", "d", "d_max", "d_hat", "d_numerator", "d_denom"),
    "schedulefree": ("k", "weight_sum", "lr_max"),
}


def tensors(whole: WholeOptimizer) -> dict[str, dict[str, torch.Tensor]]:
    """The state by kind and by the matrix's name; nothing before the first step."""
    names: dict[torch.Tensor, str] = {matrix: name for name, matrix in whole.matrices.items()}
    found: dict[str, dict[str, torch.Tensor]] = {}
    for optimizer in whole.inner:
        for parameter, state in optimizer.state.items():
            for kind, value in state.items():
                if not torch.is_tensor(value) or value.ndim == 0:
                    continue
                by_name = found.setdefault(kind, {})
                if parameter is whole.masters:
                    by_name |= dict(zip(whole.shapes, whole.split(value), strict=True))
                else:
                    by_name[names[parameter]] = value
    return found


def regular_kinds(whole: WholeOptimizer) -> list[str]:
    """Those with a number for every weight, schedule-free's average among them."""
    numbers = {name: shape.numel() for name, shape in whole.shapes.items()}
    kinds = [k for k, by in tensors(whole).items() if {name: value.numel() for name, value in by.items()} == numbers]
    return [*kinds, AVERAGE] if whole.name == "schedulefree" else kinds


def flat_kind(whole: WholeOptimizer, kind: str) -> torch.Tensor:
    """Of a regular kind, float32 [total]."""
    if kind == AVERAGE:
        average = whole.averages()
        assert average is not None
        return average
    by_name = tensors(whole)[kind]
    return torch.cat([by_name[name].reshape(-1) for name in whole.shapes])


def irregular(whole: WholeOptimizer) -> dict[str, torch.Tensor]:
    """The other tensors, by `kind/name`, in an order that a run which goes on has as well."""
    regular = regular_kinds(whole)
    found = {f"{k}/{name}": t for k, by in tensors(whole).items() if k not in regular for name, t in by.items()}
    return dict(sorted(found.items()))


def counters(whole: WholeOptimizer) -> dict[str, float]:
    """Its steps, the same for all matrices: a float where it is a tensor, an int where it is one."""
    states = [state for optimizer in whole.inner for state in optimizer.state.values()]
    return {
        key: float(value) if torch.is_tensor(value) else value
        for state in states
        for key, value in state.items()
        if not torch.is_tensor(value) or value.ndim == 0
    }


def progress(whole: WholeOptimizer) -> list[dict[str, float]]:
    """What each parameter group has counted and estimated; JSON keeps every bit of a float."""
    keys = PROGRESS.get(whole.name, ())
    groups = [group for optimizer in whole.inner for group in optimizer.param_groups]
    return [{key: group[key] for key in keys if key in group} for group in groups] if keys else []


def load(
    whole: WholeOptimizer,
    read: Callable[[str, str], torch.Tensor],
    kinds: Sequence[str],
    others: Mapping[str, torch.Tensor],
    counted: Mapping[str, float],
    groups: Sequence[Mapping[str, float]],
) -> None:
    """Put a whole state back: masters, `kinds` by `read(kind, name)`, `others` by their key, what was counted."""
    with torch.no_grad():
        for name, matrix in whole.matrices.items():
            matrix.copy_(read("weight", name))
    names = {matrix: name for name, matrix in whole.matrices.items()}
    device = whole.masters.device
    for optimizer in whole.inner:
        for parameter in [p for group in optimizer.param_groups for p in group["params"]]:
            state = optimizer.state[parameter] if kinds or others else {}
            for kind in kinds:
                if parameter is whole.masters:
                    state[kind] = torch.cat([read(kind, name).reshape(-1) for name in whole.shapes]).to(device)
                else:
                    state[kind] = read(kind, names[parameter]).to(device, copy=True)
            for key, value in others.items():
                kind, _, name = key.partition("/")
                if name == names.get(parameter):
                    state[kind] = value.to(device, copy=True)
            if state:
                restore_counters(optimizer, parameter, counted)
    if groups:
        now = [group for optimizer in whole.inner for group in optimizer.param_groups]
        for group, saved in zip(now, groups, strict=True):
            group.update(saved)
    if whole.name == "prodigy" and groups:
        whole.param_groups[0]["d"] = groups[0]["d"]
    whole.hand_over()
