"""The trainable weights' float32 masters and the optimizer's state: read whole from, and put back into, a ZeRO-2 engine.

ZeRO spreads them over the ranks in flat buffers. For a LoRA they are small (rank 32 on q, k, v: 0.3 GB each), so a
checkpoint holds them whole, by name, and any number of ranks takes its pieces from it. Values travel as bytes: what is
restored is bit-equal to what was saved.

DeepSpeed's own ways were read (0.19.8) and not taken: its checkpoints load at the same world size only;
`safe_get_full_*` sums zeros in (−0.0 becomes 0.0) with one collective a tensor; `safe_set_full_*` fails under ZeRO-3 when a
tensor doesn't divide by the ranks, needs optimizer state that only the first step creates, and leaves the model's weights.

An optimizer that is whole on every rank (train/engine/whole_optimizer.py) has its state in whole_state.py; its masters
and their moving average are here as AdamW's are.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist

from train.engine import whole_state
from train.engine.ema import EMA, Ema
from train.engine.optimizer import restore_counters
from train.engine.whole_optimizer import WholeOptimizer

WEIGHT = "weight"  # the kind of tensor that is the master weight; others are EMA and the optimizer's (exp_avg, …)
CHUNK_BYTES = 16 << 20  # of all ranks together, in one gather


@dataclass(frozen=True)
class Fragment:
    """Elements [start, start + numel) of a flattened parameter; this rank's optimizer holds them at flat[offset: …]."""

    name: str
    start: int
    numel: int
    flat: torch.Tensor  # [F], the key of the optimizer's state
    offset: int

    def of(self, flat: torch.Tensor) -> torch.Tensor:
        """This fragment's part of a tensor that is laid out as `flat` is."""
        return flat.detach().narrow(0, self.offset, self.numel)


def trainable_parameters(engine: Any) -> dict[str, Any]:
    """The trained parameters (with DeepSpeed's attributes) by name, in the module's order, the same on all ranks."""
    flat = getattr(engine.module, "flat", None)
    return {
        name.replace("_orig_mod.", ""): parameter
        for name, parameter in engine.module.named_parameters()
        if parameter.requires_grad and parameter is not flat
    }


def trainable_shapes(engine: Any) -> dict[str, tuple[int, ...]]:
    """Shapes by name."""
    return {name: tuple(parameter.shape) for name, parameter in trainable_parameters(engine).items()}


def fragments(engine: Any) -> list[Fragment]:
    """What this rank holds. Raises ValueError for an engine that keeps its optimizer state elsewhere."""
    zero, found = engine.optimizer, []
    stage = engine.zero_optimization_stage()
    if stage not in (1, 2):
        raise ValueError(f"checkpoints need an engine of ZeRO stage 2, this one runs stage {stage}")
    if getattr(zero, "swap_optimizer", False):
        raise ValueError("checkpoints don't support optimizer state on NVMe: set offload_optimizer's device to cpu")
    if getattr(zero, "partial_offload", 1.0) != 1.0:
        raise ValueError(
            "checkpoints don't support a part of the optimizer on the CPU: set offload_optimizer's ratio to 1"
        )
    if not isinstance(zero.optimizer, torch.optim.AdamW | WholeOptimizer):
        raise ValueError(f"checkpoints know torch.optim.AdamW, this engine runs {type(zero.optimizer).__name__}")
    if getattr(engine.module, "flat", None) is not None:
        return _fragments_of_flat(engine)
    for name, parameter in trainable_parameters(engine).items():
        if parameter._hp_mapping is not None:
            here, there = parameter._hp_mapping.lp_fragment_address, parameter._hp_mapping.hp_fragment_address
            flat = zero.single_partition_of_fp32_groups[parameter._hp_mapping.param_group_index]
            found.append(Fragment(name, here.start, here.numel, flat, there.start))
    return found


def _fragments_of_flat(engine: Any) -> list[Fragment]:
    """Where the matrices of train/step/flat_parameter.py meet this rank's part of the one parameter that they are views of."""
    mapping = engine.module.flat._hp_mapping
    if mapping is None:
        return []
    here, there = mapping.lp_fragment_address, mapping.hp_fragment_address
    master = engine.optimizer.single_partition_of_fp32_groups[mapping.param_group_index]
    found, first = [], 0
    for name, parameter in trainable_parameters(engine).items():
        start, end = max(first, here.start), min(first + parameter.numel(), here.start + here.numel)
        if start < end:
            found.append(Fragment(name, start - first, end - start, master, there.start + start - here.start))
        first += parameter.numel()
    return found


def read_counters(engine: Any) -> dict[str, float]:
    """The optimizer's counters (AdamW's step); empty before the first step."""
    if (whole := whole_of(engine)) is not None:
        return whole_state.counters(whole)
    states = engine.optimizer.optimizer.state.values()
    return {key: float(v) for state in states for key, v in state.items() if torch.as_tensor(v).numel() == 1}


def read_kinds(engine: Any) -> list[str]:
    """WEIGHT and the optimizer's kinds of tensor, the same list on all ranks."""
    here = {WEIGHT} if ema_of(engine) is None else {WEIGHT, EMA}
    if (whole := whole_of(engine)) is not None:
        here |= set(whole_state.regular_kinds(whole))
    for flat, state in engine.optimizer.optimizer.state.items():
        here |= {key for key, value in state.items() if torch.is_tensor(value) and value.shape == flat.shape}
    everywhere: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(everywhere, here)
    return [WEIGHT, *sorted(set().union(*everywhere) - {WEIGHT})]


def ema_of(engine: Any) -> Ema | None:
    """The moving average that `initialize` gave the engine, if the run keeps one."""
    return vars(engine).get("ema")


def whole_of(engine: Any) -> WholeOptimizer | None:
    """The engine's optimizer, if it is whole on every rank."""
    optimizer = engine.optimizer.optimizer
    return optimizer if isinstance(optimizer, WholeOptimizer) else None


def lora_kind(engine: Any) -> str:
    """The kind of tensor that is the run's LoRA: the weights, but schedule-free's average."""
    whole = whole_of(engine)
    return whole_state.AVERAGE if whole is not None and whole.name == "schedulefree" else WEIGHT


def held(engine: Any, flat: torch.Tensor, kind: str) -> torch.Tensor:
    """The tensor of a kind that is laid out as this rank's master buffer `flat` is."""
    if kind == WEIGHT:
        return flat
    if kind == EMA:
        ema = ema_of(engine)
        assert ema is not None, "this engine keeps no moving average"
        return ema.averages[flat]
    found: torch.Tensor = engine.optimizer.optimizer.state[flat][kind]
    return found


def gather(engine: Any, kinds: list[str]) -> Iterator[torch.Tensor | None]:
    """For each kind: float32 [total] on the CPU of rank 0, all parameters flattened one after the other; None elsewhere.

    A collective over these parameters alone; it holds one kind at a time, and CHUNK_BYTES on the device.
    """
    mine = fragments(engine)
    layout: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(layout, [(f.name, f.start, f.numel) for f in mine])
    first, total = {}, 0
    for name, shape in trainable_shapes(engine).items():
        first[name] = total
        total += torch.Size(shape).numel()
    places = [runs([(first[name] + start, numel) for name, start, numel in rank]) for rank in layout]
    covered = sum(numel for rank in places for _, numel in rank)
    assert covered == total, f"the ranks hold {covered} of {total} elements"
    for kind in kinds:
        if (optimizer := whole_of(engine)) is not None and kind not in (WEIGHT, EMA):
            yield whole_state.flat_kind(optimizer, kind).cpu() if dist.get_rank() == 0 else None
            continue
        pieces = [f.of(held(engine, f.flat, kind)) for f in mine]
        local = torch.cat(pieces) if pieces else torch.empty(0)
        assert local.dtype == torch.float32, f"{kind} is {local.dtype}: master weights and moments must be float32"
        whole = torch.empty(total if dist.get_rank() == 0 else 0)
        gather_into(whole, local, places, engine.device)
        yield whole if dist.get_rank() == 0 else None


def runs(pieces: list[tuple[int, int]]) -> list[tuple[int, int]]:
    """(start, length) pairs with neighbors made one: of a flat parameter each rank has a single run."""
    joined: list[tuple[int, int]] = []
    for start, length in pieces:
        if joined and sum(joined[-1]) == start:
            joined[-1] = joined[-1][0], joined[-1][1] + length
        else:
            joined.append((start, length))
    return joined


def gather_into(
    whole: torch.Tensor, local: torch.Tensor, places: list[list[tuple[int, int]]], device: torch.device
) -> None:
    """Put each rank's `local` float32 elements where `places[rank]` says in rank 0's `whole`, chunk by chunk."""
    sizes = [sum(length for _, length in rank) for rank in places]
    chunk = min(CHUNK_BYTES // 4 // len(sizes), max(sizes))
    mine = torch.zeros(chunk, device=device)
    everyone = [torch.empty_like(mine) for _ in sizes] if dist.get_rank() == 0 else None
    for begin in range(0, max(sizes), chunk):
        here = local[begin : begin + chunk]
        mine[: len(here)] = here
        dist.gather(mine, everyone, dst=0)
        for rank, sent in zip(places, everyone or [], strict=bool(everyone)):
            done = 0  # elements of this rank that lie before its run
            for start, length in rank:
                low, high = max(begin, done), min(begin + chunk, done + length)
                if low < high:
                    whole[start + low - done : start + high - done].copy_(sent[low - begin : high - begin])
                done += length


def restore(
    engine: Any,
    read: Callable[[str, str], torch.Tensor],
    kinds: list[str],
    counters: dict[str, float],
    others: Mapping[str, torch.Tensor] | None = None,
    groups: Sequence[Mapping[str, float]] = (),
) -> None:
    """Put a whole state back, at any number of ranks: masters, moments, counters, and the model's own weights.

    `read(kind, name)` gives the whole float32 tensor of a parameter; `others`, `groups`: of train/engine/whole_state.py. No
    collectives. A moving average that the engine keeps and `kinds` lacks begins anew, at the weights.
    """
    optimizer, ema = engine.optimizer.optimizer, ema_of(engine)
    if ema is None:
        kinds = [kind for kind in kinds if kind != EMA]
    if (whole := whole_of(engine)) is not None:
        own = [kind for kind in kinds if kind not in (WEIGHT, EMA, whole_state.AVERAGE)]
        whole_state.load(whole, read, own, others or {}, counters, groups)
        kinds, counters = [kind for kind in kinds if kind in (WEIGHT, EMA)], {}
    for flat in flat_masters(engine):
        for kind in kinds:
            if kind not in (WEIGHT, EMA) and kind not in optimizer.state[flat]:  # AdamW creates them in its first step
                optimizer.state[flat][kind] = torch.zeros_like(flat).requires_grad_(False)
        restore_counters(optimizer, flat, counters)
    for fragment in fragments(engine):
        for kind in kinds:
            values = read(kind, fragment.name).reshape(-1)[fragment.start : fragment.start + fragment.numel]
            fragment.of(held(engine, fragment.flat, kind)).copy_(values)
    if ema is not None and EMA not in kinds:
        ema.begin()
    for name, parameter in trainable_parameters(engine).items():
        parameter.data.copy_(read(WEIGHT, name))  # as an optimizer step does: the master, rounded to the model's type


def flat_masters(engine: Any) -> list[torch.Tensor]:
    """This rank's flat float32 buffers."""
    return engine.optimizer.single_partition_of_fp32_groups
