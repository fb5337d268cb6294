"""What a card of so many GiB is given when base_precision and resident_blocks are left open: full-size sizes, no weights."""

from dataclasses import replace
from typing import Any

import pytest

from qwen_image.free_memory import GIB
from tests.helpers.full_size_setup import setup
from train.fit.base_choice import as_asked, candidates, choice_lines, fastest_base, fits
from train.fit.memory_plan import Machine, Setup
from train.fit.step_time import step_seconds

OPEN: dict[str, Any] = {"can_tabulate": True, "tabulated": True, "open_precision": True, "open_home": True}


def chosen(card: int, float8: bool = True, host: int = 64, **options: Any) -> tuple[Setup, Setup, Machine]:
    machine = Machine(card * GIB, host * GIB, float8)
    asked = setup("zero2", **OPEN | options)
    return asked, fastest_base(asked, machine), machine


@pytest.mark.parametrize("card", [40, 48, 80])
def test_the_exact_base_stays_where_it_fits(card: int) -> None:
    asked, found, machine = chosen(card)
    assert found is asked and choice_lines(asked, found, machine) == []


@pytest.mark.parametrize(
    ("card", "float8", "precision", "resident"),
    [
        (24, True, "float8", (60, 60)),
        (16, True, "float8", (40, 59)),
        (12, True, "float8", (20, 45)),
        (8, True, "float8", (1, 25)),
        (24, False, "dtype", (20, 50)),
        (16, False, "int8", (5, 59)),
        (8, False, "int8", (0, 25)),
    ],
)
def test_small_cards_get_8_bits_and_as_many_blocks_as_pay(
    card: int, float8: bool, precision: str, resident: tuple[int, int]
) -> None:
    asked, found, machine = chosen(card, float8)
    assert ("float8" if found.base.float8 else "int8" if found.base.int8 else "dtype") == precision
    assert resident[0] <= found.base.home.resident <= resident[1], found.base.home
    assert fits(found, machine) and found.checkpointed_blocks == asked.checkpointed_blocks == 60
    assert not fits(asked, machine)
    (line,) = choice_lines(asked, found, machine)
    assert line.startswith(f"base_precision {precision}, ") and f"fits {card} GiB; the exact base would want" in line


def test_nothing_that_fits_is_faster() -> None:
    asked, found, machine = chosen(12)
    fitting = [other for other in candidates(asked, machine) if fits(as_asked(other, asked), machine)]
    assert len(fitting) > 20
    best = min(fitting, key=step_seconds)
    assert (best.base.float8, best.base.home) == (found.base.float8, found.base.home)
    slower = replace(found.base.home, resident=found.base.home.resident - 5)
    assert step_seconds(replace(found, base=replace(found.base, home=slower))) > step_seconds(found)


def test_what_was_asked_for_is_kept() -> None:
    exact = chosen(12, open_precision=False)[1]
    assert not (exact.base.float8 or exact.base.int8) and 0 < exact.base.home.resident < 30
    whole, found, _ = chosen(12, open_home=False)
    assert found is whole  # all resident was asked for, and fits in no precision
    assert chosen(2)[1].base.home.resident == 60  # nothing fits: unchanged, and refused by the plan
    assert chosen(8, host=4)[1].base.home.resident == 60  # nor without room on the host
