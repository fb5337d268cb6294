"""`--base_precision auto` and `--resident_blocks auto`: the fastest base that fits the card, decided before weights are read.

The exact base wherever it fits, with every block recomputed if need be. Where it doesn't, of all ways that fit the one
whose step is the shortest by train/fit/step_time.py: 8 bits or not, so many blocks resident, so many recomputed. The latter
two compete for the same bytes: a resident block saves two fetches, a block that isn't recomputed a forward pass. Trial steps
later say how many blocks need really be recomputed (activation_checkpointing.py).
"""

from collections.abc import Iterator
from dataclasses import replace

from qwen_image.free_memory import GIB
from train.fit.activation_checkpointing import MARGIN_SHARE, margin
from train.fit.memory_plan import Machine, MemoryPlan, Setup, plan_memory
from train.fit.step_time import step_seconds
from train.process.ranks import Ranks


def choose_base(setup: Setup, ranks: Ranks) -> Setup:
    """The setup with its base decided, told where something was decided. A collective: the smallest card decides for all."""
    machine = Machine.of(ranks.device).smallest(ranks)
    chosen = fastest_base(setup, machine)
    ranks.say(*choice_lines(setup, chosen, machine))
    return chosen


def fastest_base(setup: Setup, machine: Machine) -> Setup:
    """The setup with the fastest base that fits; unchanged where nothing is open, or nothing would fit."""
    base = setup.base
    if machine.device_total is None or not (base.open_precision or base.open_home) or fits(setup, machine):
        return setup
    fitting = [other for other in candidates(setup, machine) if fits(as_asked(other, setup), machine)]
    # Loaded as if every block were recomputed: trial steps, not the estimate, give memory away.
    return as_asked(min(fitting, key=step_seconds), setup) if fitting else setup


def as_asked(setup: Setup, before: Setup) -> Setup:
    """With as many checkpointed blocks as the run may have."""
    return replace(setup, checkpointed_blocks=before.checkpointed_blocks)


def candidates(setup: Setup, machine: Machine) -> Iterator[Setup]:
    """Each precision with each number of resident blocks, recomputing as few blocks as the estimate allows."""
    base, blocks = setup.base, setup.base.blocks
    precisions = [(base.float8, base.int8)]
    if base.open_precision:
        precisions = [(False, False), (False, True)] + [(True, False)] * (
            machine.multiplies_float8 and base.dtype.itemsize == 2 and not setup.zero.casts_buffers
        )
    for float8, int8 in precisions:
        for resident in range(blocks + 1) if base.open_home else (base.home.resident,):
            home = replace(base.home, resident=resident)
            other = replace(setup, base=replace(base, float8=float8, int8=int8, home=home))
            yield least_recomputed(other, machine)


def least_recomputed(setup: Setup, machine: Machine) -> Setup:
    """With as few checkpointed blocks as fit, up to what is allowed; memory falls with each."""
    low, high = 0, setup.checkpointed_blocks
    while low < high:
        middle = (low + high) // 2
        if fits(replace(setup, checkpointed_blocks=middle), machine):
            high = middle
        else:
            low = middle + 1
    return replace(setup, checkpointed_blocks=high)


def fits(setup: Setup, machine: Machine) -> bool:
    """With every estimate and the margin of the trial steps."""
    plan = plan_memory(setup, machine)
    return plan.likely_fits and plan.bytes <= room(plan)


def room(plan: MemoryPlan) -> float:
    return float("inf") if plan.device_total is None else plan.device_total - margin(plan.device_total)


def choice_lines(asked: Setup, chosen: Setup, machine: Machine) -> list[str]:
    """What was decided and what more memory would bring; empty where nothing was."""
    if chosen is asked:
        return []
    base = chosen.base
    name = "float8" if base.float8 else "int8" if base.int8 else "dtype"
    resident = f"{base.home.resident} of {base.blocks} blocks stay on the GPU, the others come from host memory"
    if base.home.resident == base.blocks:
        resident = "all blocks stay on the GPU"
    exact = plan_memory(asked, machine).bytes / (1 - MARGIN_SHARE) / GIB
    line = f"base_precision {name}, {resident}: the fastest that fits {machine.device_total_gib:.0f} GiB; "
    return [line + f"the exact base would want {exact:.1f} GiB"]
