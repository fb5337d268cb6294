"""What a user whose card is too small is told, with the full-size transformer's sizes."""

from dataclasses import replace
from typing import Any

import pytest

from qwen_image.free_memory import GIB
from tests.helpers.full_size_setup import ENCODERS, setup, zero_plan
from train.fit.cheapest_change import SHIPPED, Change, advice, changes, cheapest_change, check_memory, seconds
from train.fit.memory_plan import Machine, plan_memory

USUAL: dict[str, Any] = {"can_tabulate": True, "tabulated": True}  # modulation_table auto, LoRA on q, k and v


def change(card: int, host: int = 64, can_float8: bool = True, file: str = "zero2", **options: Any) -> Change | None:
    return cheapest_change(setup(file, **USUAL | options), Machine(card * GIB, host * GIB, can_float8))


def test_the_plans_of_the_four_files_are_those_of_the_table() -> None:
    for name, zero in SHIPPED.items():
        assert replace(zero_plan(name), settings={}) == zero


ENCODED_BEFORE = "the data encoded beforehand (data_prep/encode_shards.py)"


@pytest.mark.parametrize(
    "card,host,can_float8,options,flags",
    [
        (24, 64, True, {}, ["--base_precision float8"]),
        (24, 64, True, {"checkpointed_blocks": 0}, ["--base_precision float8", "--activation_checkpointing auto"]),
        (24, 64, False, {}, ["--base_precision int8"]),  # a card that can't multiply float8
        (8, 20, False, {}, ["--base_precision int8", "--resident_blocks auto"]),  # blocks from host memory
        (
            8,
            10,
            False,
            {},
            ["--deepspeed ds_configs/zero3.json on 16 GPUs"],
        ),  # and no room there: of 8 GiB a tenth stays free
        (24, 64, True, {"encoders": ENCODERS}, ["--resident_blocks auto"]),  # then the encoder stays
        (24, 64, True, {"encoders": ENCODERS, "encoder_device": "device", "float8": True}, [ENCODED_BEFORE]),
        (40, 64, True, {"encoders": ENCODERS, "encoder_device": "device"}, [ENCODED_BEFORE]),
        (40, 64, True, {"tabulated": False}, ["--modulation_table auto"]),
        (
            40,
            64,
            True,
            {"can_tabulate": False, "tabulated": False},
            ["--base_precision float8"],
        ),  # LoRA on the modulation
        (16, 64, True, {}, ["--base_precision float8", "--offload_activations true"]),
        (8, 64, True, {}, ["--base_precision float8", "--resident_blocks auto"]),
        (
            24,
            64,
            True,
            {"tokens": 64 * 4224, "batch_size": 64, "float8": True},
            ["--batch_size 4"],
        ),  # the largest that fits
        (
            80,
            64,
            True,
            {"checkpointed_blocks": 0, "tokens": 8 * 4224, "batch_size": 8},
            ["--activation_checkpointing auto"],
        ),
    ],
)
def test_the_cheapest_change(card: int, host: int, can_float8: bool, options: dict[str, Any], flags: list[str]) -> None:
    chosen = change(card, host, can_float8, **options)
    assert chosen is not None and list(chosen.flags) == flags, str(chosen)
    assert chosen.plan.likely_fits and sum(chosen.plan.device.values()) <= card * GIB


def test_nothing_that_fits_is_cheaper() -> None:
    """Against trying everything: what is faster and fits changes the batch, or takes more GPUs."""
    machine = Machine(24 * GIB, 64 * GIB, True)
    run = setup("zero2", **USUAL, checkpointed_blocks=10, batch_size=2, tokens=2 * 4224)
    chosen = cheapest_change(run, machine)
    assert chosen is not None and not chosen.more_gpus
    for flags, other in changes(run, machine):
        if other.world == 1 and other.batch_size == 2 and plan_memory(other, machine).likely_fits:
            assert seconds(other, machine) >= seconds(chosen.setup, machine) * 0.999, flags


def test_what_is_said() -> None:
    machine = Machine(24 * GIB, 64 * GIB, True)
    text = advice(setup("zero2", **USUAL), machine)
    assert text == (
        "the cheapest change that fits is --base_precision float8 (16.4 GiB on each GPU; a step about 0.75 × as long)"
    )
    assert advice(setup("zero2", **USUAL), Machine(1 * GIB, 1 * GIB)).startswith("nothing fits here")


def test_a_card_that_is_too_small_is_refused_with_the_change(monkeypatch: pytest.MonkeyPatch) -> None:
    said: list[str] = []
    ranks: Any = type("R", (), {"device": None, "say": lambda self, *lines: said.extend(lines)})()
    monkeypatch.setattr(Machine, "of", classmethod(lambda cls, device: Machine(24 * GIB, 64 * GIB, True)))
    with pytest.raises(
        ValueError, match=r"on each GPU, which has 24\.0: the cheapest change that fits is --base_precision"
    ):
        check_memory(setup("zero2", **USUAL), ranks)
    assert check_memory(setup("zero2", **USUAL, float8=True), ranks).likely_fits and said
    said.clear()
    monkeypatch.setattr(Machine, "of", classmethod(lambda cls, device: Machine(27 * GIB, 64 * GIB, True)))
    check_memory(setup("zero2", **USUAL), ranks)  # the weights fit, the rest likely doesn't
    assert said[-1].startswith(
        "warning: that is likely too much: the cheapest change that fits is --base_precision float8"
    )
