"""A run that doesn't fit is refused before weights are read, with the cheapest change that would, by the same memory plan."""

import itertools
import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

from qwen_image.free_memory import GIB
from train.base_model.base_home import BaseHome
from train.config.zero_plan import ZeroPlan
from train.fit.activation_checkpointing import margin
from train.fit.memory_plan import Machine, MemoryPlan, Setup, plan_memory
from train.fit.step_time import BF16, step_seconds
from train.process.ranks import Ranks

SWAPPED, ENCODED_ON_CPU = 2.0, 100.0  # added; guesses: 14 GB over PCIe for each batch, and the text encoder on a CPU
PARKED, CPU_ADAMW = 0.05, 0.2  # added by --offload_activations, and by AdamW on the CPU; guesses
# What a change is thought to cost besides time: a base rounded to 8 bits, and a smaller batch (or twice the accumulation).
ROUNDED, SMALLER_BATCH = 0.5, 0.5
GPUS = (2, 4, 8, 16)

# What ds_configs/ holds (a test compares); the settings for DeepSpeed itself are not needed here.
ZERO2 = ZeroPlan(2, reduce_bucket_size=50_000_000)
ZERO3 = ZeroPlan(3, reduce_bucket_size=50_000_000)
SHIPPED = {
    "zero2": ZERO2,
    "zero2_offload": replace(ZERO2, offload_optimizer=True),
    "zero3": ZERO3,
    "zero3_offload": replace(ZERO3, offload_param=True, pin_param=True, offload_optimizer=True),
}


@dataclass(frozen=True)
class Change:
    """Another setup, the flags that lead to it, and its plan.

    Attributes:
        slower: how much longer a sample takes than as it was asked for, as a factor; at most, where blocks are recomputed.
        price: that, but a gain isn't counted, and what it changes besides is.
        more_gpus: it needs GPUs that the run doesn't have.
    """

    flags: tuple[str, ...]
    setup: Setup
    plan: MemoryPlan
    slower: float
    price: float
    more_gpus: bool

    def order(self) -> tuple[float, ...]:
        """Of two changes that fit, the one with the smaller order is proposed."""
        size, world = self.setup.batch_size, self.setup.world
        return self.more_gpus, round(self.price, 3), len(self.flags), -size, world, self.plan.bytes

    def __str__(self) -> str:
        total = sum(self.plan.device.values()) / GIB
        host = f" and {sum(self.plan.host.values()) / GIB:.1f} of host memory" if self.plan.host else ""
        return f"{' '.join(self.flags)} ({total:.1f} GiB on each GPU{host}; a step about {self.slower:.2g} × as long)"


def check_memory(setup: Setup, ranks: Ranks) -> MemoryPlan:
    """The plan of this run on this machine, told. Raises ValueError when it can't fit, naming what would."""
    machine = Machine.of(ranks.device)
    plan = plan_memory(setup, machine)
    excess = plan.excess()
    if excess is not None:
        raise ValueError(f"{excess}: {advice(setup, machine)}")
    ranks.say(*plan.lines())
    if not plan.likely_fits:
        ranks.say(f"warning: that is likely too much: {advice(setup, machine)}")
    return plan


def advice(setup: Setup, machine: Machine, below: int | None = None) -> str:
    """The cheapest change in words, or that there is none."""
    change = cheapest_change(setup, machine, below)
    if change is None:
        return "nothing fits here, not even zero3.json on 16 such GPUs; it needs larger ones, or more host memory"
    return f"the cheapest change that fits is {change}"


def cheapest_change(setup: Setup, machine: Machine, below: int | None = None) -> Change | None:
    """The change of the lowest price with which the run fits, estimates included; None: there is none.

    More GPUs are proposed only where nothing else helps; at the same price fewer flags win, then the largest batch, the fewest
    GPUs, the least memory.
    `below`: bytes that its plan must stay under, where the plan of `setup` proved too small.
    """
    asked, fitting = seconds(setup, machine), []
    limit = math.inf if machine.device_total is None else machine.device_total - margin(machine.device_total)
    limit = limit if below is None else min(limit, below)
    for flags, other in changes(setup, machine):
        plan = plan_memory(other, machine)
        if plan.bytes <= limit and plan.likely_fits:
            slower = seconds(other, machine) / asked
            rounds = (other.base.float8 or other.base.int8) and not (setup.base.float8 or setup.base.int8)
            price = max(1.0, slower) + ROUNDED * rounds
            price += SMALLER_BATCH * (other.batch_size < setup.batch_size)
            fitting.append(Change(flags, other, plan, slower, price, other.world > setup.world))
    return min(fitting, key=Change.order, default=None)


def seconds(setup: Setup, machine: Machine) -> float:
    """Of a step's share of one sample, beside those of bf16 with nothing recomputed."""
    time = step_seconds(setup) / BF16
    time += PARKED * setup.offload_activations + CPU_ADAMW * setup.zero.offload_optimizer
    place = "device" if setup.encoders is None else plan_memory(setup, machine).encoders
    return time + {"device": 0.0, "swap": SWAPPED, "cpu": ENCODED_ON_CPU}[place]


def changes(setup: Setup, machine: Machine) -> Iterator[tuple[tuple[str, ...], Setup]]:
    """Every combination of what can be changed, but for no change at all: the flags, and the setup that they make."""
    groups = [zeros(setup), precisions(setup, machine), homes(setup), tables(setup), checkpointing(setup)]
    groups += [batches(setup), offloading(setup), encoders(setup)]
    for parts in itertools.product(*groups):
        flags = tuple(flag for flag, _ in parts if flag)
        fields = {name: value for _, change in parts for name, value in change.items()}
        base = replace(setup.base, **{name: fields.pop(name) for name in BASE if name in fields})
        other = replace(setup, base=base, **fields)
        if "zero" in fields:
            home = BaseHome.of(other.zero, base.blocks, None, other.world, other.local_world)
            other = replace(other, base=replace(base, home=home))
        if flags and possible(other):
            yield flags, other


Option = tuple[str, dict[str, Any]]
BASE = "float8", "int8", "tabulated", "home"  # fields of the base's plan


def possible(setup: Setup) -> bool:
    """Whether the trainer would take it: DoRA needs whole, exact weights."""
    base = setup.base
    if setup.dora and (base.float8 or base.int8 or base.home.streamed(base.blocks)):
        return False
    return not (base.float8 and (base.int8 or setup.zero.casts_buffers))


def zeros(setup: Setup) -> list[Option]:
    options: list[Option] = [("", {})]
    for name, zero in SHIPPED.items():
        counts = [setup.world] + ([n for n in GPUS if n > setup.world] if name == "zero3" else [])
        for world in counts:
            local = setup.local_world if world == setup.world else world
            more = f" on {world} GPUs" if world > setup.world else ""
            if replace(zero, settings={}) == replace(setup.zero, settings={}) and not more:
                continue
            options.append(
                (f"--deepspeed ds_configs/{name}.json{more}", {"zero": zero, "world": world, "local_world": local})
            )
    return options


def precisions(setup: Setup, machine: Machine) -> list[Option]:
    options: list[Option] = [("", {})]
    if machine.multiplies_float8 and setup.base.dtype.itemsize == 2 and not setup.base.float8:
        options.append(("--base_precision float8", {"float8": True, "int8": False}))
    if not setup.base.int8 and not setup.base.float8:
        options.append(("--base_precision int8", {"int8": True}))
    return options


def homes(setup: Setup) -> list[Option]:
    """Blocks from host memory; counted as if none could stay, which is the slowest."""
    home = setup.base.home
    if setup.zero.partitioned or not home.resident:
        return [("", {})]
    return [("", {}), ("--resident_blocks auto", {"home": replace(home, resident=0)})]


def tables(setup: Setup) -> list[Option]:
    open_ = setup.base.can_tabulate and not setup.base.tabulated
    return [("", {})] + ([("--modulation_table auto", {"tabulated": True})] if open_ else [])


def checkpointing(setup: Setup) -> list[Option]:
    blocks = setup.base.blocks
    options: list[Option] = [("", {})]
    if setup.checkpointed_blocks < blocks:
        options.append(("--activation_checkpointing auto", {"checkpointed_blocks": blocks}))
    return options


def batches(setup: Setup) -> list[Option]:
    options: list[Option] = [("", {})]
    size = setup.batch_size // 2
    while size:
        tokens = -(-setup.tokens * size // setup.batch_size)
        options.append((f"--batch_size {size}", {"batch_size": size, "tokens": tokens}))
        size //= 2
    return options


def offloading(setup: Setup) -> list[Option]:
    return [("", {})] + (
        [] if setup.offload_activations else [("--offload_activations true", {"offload_activations": True})]
    )


def encoders(setup: Setup) -> list[Option]:
    if setup.encoders is None:
        return [("", {})]
    options: list[Option] = [("", {}), ("the data encoded beforehand (data_prep/encode_shards.py)", {"encoders": None})]
    return options + [(f"--encoder_device {place}", {"encoder_device": place}) for place in ("swap", "cpu")]
