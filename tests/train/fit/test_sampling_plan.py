"""Making images on cards of all sizes: what the plan takes for the full-size transformer, and what it refuses. No weights."""

from dataclasses import replace

import pytest
import torch

from qwen_image.free_memory import GIB
from qwen_image.model.sizes import TransformerConfig
from qwen_image.model.transformer import QwenImageTransformer
from train.fit.base_choice import fastest_base, fits
from train.fit.memory_plan import Machine
from train.fit.sampling_plan import ImageWork, base_line, refuse_what_does_not_fit, setup_of

WORK = ImageWork(1024, 1024, ((50, 4096),), torch.bfloat16)


@pytest.fixture(scope="module")
def empty() -> QwenImageTransformer:
    with torch.device("meta"):
        return QwenImageTransformer(TransformerConfig())


@pytest.mark.parametrize(
    ("card", "float8", "precision", "resident"),
    [
        (80, True, "exact", (60, 60)),
        (40, True, "exact", (60, 60)),
        (24, True, "float8", (60, 60)),
        (16, True, "float8", (50, 60)),
        (12, True, "float8", (25, 59)),
        (8, True, "float8", (5, 40)),
        (8, False, "int8", (0, 40)),
    ],
)
def test_each_card_gets_the_fastest_that_fits(empty, card, float8, precision, resident) -> None:
    machine, asked = Machine(card * GIB, 64 * GIB, float8), setup_of(empty, WORK)
    found = fastest_base(asked, machine)
    assert ("float8" if found.base.float8 else "int8" if found.base.int8 else "exact") == precision
    assert resident[0] <= found.base.home.resident <= resident[1], found.base.home
    assert fits(found, machine) and found.base.tabulated
    refuse_what_does_not_fit(found, machine, WORK)
    line = base_line(asked, found, machine, 0)
    assert line.startswith(f"transformer {precision}, {found.base.home.resident} of 60 blocks stay on the GPU")


def test_what_fits_in_no_way_is_refused_with_numbers(empty) -> None:
    for machine, work in (
        (Machine(2 * GIB, 64 * GIB, True), WORK),
        (Machine(8 * GIB, 2 * GIB, True), WORK),
        (Machine(24 * GIB, 64 * GIB, True), replace(WORK, dora=True)),
        (Machine(24 * GIB, 64 * GIB, True), replace(WORK, precision="dtype", resident_blocks=60)),
    ):
        with pytest.raises(
            ValueError, match=r"an image of 1024×1024 pixels takes [\d.]+ GiB on the GPU .* are free: "
        ) as error:
            refuse_what_does_not_fit(fastest_base(setup_of(empty, work), machine), machine, work)
        assert ("train/merge_lora.py" in str(error.value)) == work.dora


def test_a_lora_on_the_modulation_keeps_its_layers(empty) -> None:
    name = "transformer_blocks.3.img_mod.1"
    assert not setup_of(empty, replace(WORK, adapted=(name,))).base.tabulated
    assert setup_of(empty, replace(WORK, adapted=("transformer_blocks.3.attn.to_q",))).base.tabulated


def test_what_can_not_go_together(empty) -> None:
    for work in (replace(WORK, dora=True, resident_blocks=3), replace(WORK, dora=True, precision="int8")):
        with pytest.raises(ValueError, match="a DoRA needs whole, exact weights"):
            setup_of(empty, work)
    with pytest.raises(ValueError, match="--resident_blocks: 61 blocks to keep, but the model has 60"):
        setup_of(empty, replace(WORK, resident_blocks=61))
