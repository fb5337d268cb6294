"""The memory plan: what it counts, where it puts things, and what it refuses."""

import re
from dataclasses import replace

import pytest
import torch

from qwen_image.free_memory import GIB
from tests.helpers.full_size_setup import ENCODERS, LORA, QWEN, plan, setup
from train.base_model.base_home import BaseHome
from train.config.zero_plan import ZeroPlan
from train.fit.memory_plan import engine_bytes


def test_stage_2_keeps_the_base_on_every_card() -> None:
    two = plan("zero2", 8)
    assert two.device["base"] == 2 * QWEN and not two.host
    assert two.excess() is None
    assert plan("zero2", 8, card=24).excess() == "weights and optimizer take 38.4 GiB on each GPU, which has 24.0"


def test_stage_3_divides_the_blocks() -> None:
    """The table stands in for the modulation, so a block is 226.5 M weights; three of them are on the card at a time."""
    block, outside = 2 * 226_492_416, 2 * (QWEN - 60 * 226_492_416 - 6_814_126_080)
    three = plan("zero3", 8, tabulated=True)
    assert three.device["base"] == pytest.approx(60 * block / 8 + outside, rel=1e-2)
    assert three.device["arriving blocks"] == pytest.approx(3 * block, rel=1e-3) and not three.host
    kept = plan("zero3", 8, tabulated=True, checkpointed_blocks=30)
    assert kept.device["arriving blocks"] == three.device["arriving blocks"]
    assert plan("zero3", 8, card=24).excess() is None
    eight_bits = plan("zero3", 8, tabulated=True, float8=True)
    assert eight_bits.device["arriving blocks"] == pytest.approx(three.device["arriving blocks"] / 2, rel=0.01)


def test_a_copy_a_node_where_there_are_several() -> None:
    run = setup("zero3", 8, tabulated=True)
    home = BaseHome.of(run.zero, 60, None, world=16, local_world=8)
    assert home.sharing == 8 and BaseHome.of(replace(run.zero, hpz=4), 60, None, 16, 8).sharing == 4
    assert BaseHome.of(run.zero, 60, None, world=6, local_world=4).sharing == 6  # unequal nodes
    with pytest.raises(ValueError, match="61 blocks to keep on the GPU, but the model has 60"):
        BaseHome.of(run.zero, 60, 61, 1, 1)


def test_blocks_that_stay_are_spread_among_those_that_come() -> None:
    home = BaseHome(20)
    assert sorted(home.on_device(60)) == list(range(0, 60, 3)) and home.streamed(60) == 40
    assert BaseHome(60).line(60) is None and BaseHome(0).slots(2) == 2
    some = plan("zero2", 1, tabulated=True, resident=20)
    block = 2 * 226_492_416
    whole = plan("zero2", 1, tabulated=True)
    assert whole.device["base"] - some.device["base"] == pytest.approx(40 * block, rel=1e-3)
    assert some.host["base"] == pytest.approx(40 * block, rel=1e-3)


def test_offload_needs_host_memory() -> None:
    offload = plan("zero3_offload", 4)
    assert offload.host["base"] == pytest.approx(2 * QWEN, rel=0.01) and offload.device["base"] < GIB
    assert "AdamW" in offload.host
    assert offload.excess() is None
    told = plan("zero3_offload", 4, host=16).excess()
    assert told and re.match(r"offloading takes 3\d\.\d GiB of host memory .* but 16\.0 are free$", told)
    parked = plan("zero2", 1, offload_activations=True)
    assert parked.host["activations"] == 60 * 4224 * 3072 * 2


@pytest.mark.parametrize(
    "card,option,place", [(80, "auto", "device"), (48, "auto", "swap"), (80, "swap", "swap"), (80, "cpu", "cpu")]
)
def test_encoders_go_where_there_is_room(card: int, option: str, place: str) -> None:
    chosen = plan("zero2", 1, card=card, encoders=ENCODERS, encoder_device=option)
    assert chosen.encoders == place
    on_card = {"device": 2 * sum(ENCODERS), "swap": 2 * ENCODERS.vae, "cpu": 0}[place]
    assert chosen.device.get("encoders", 0) + chosen.device.get("VAE", 0) == on_card


def test_lines_add_up() -> None:
    offload = plan("zero3_offload", 2, card=1)
    lines = offload.lines()
    assert lines[0].startswith("memory on each GPU of 1 GiB (activations estimated") and not offload.likely_fits
    assert lines[0].endswith(f"= {sum(offload.device.values()) / GIB:.2f} GiB") and "base 37." in lines[1]


@pytest.mark.parametrize(
    "tokens,blocks,measured",
    [(4224, 0, 16.25), (4224, 60, 1.90), (9216, 0, 35.34), (9216, 60, 3.97), (7017, 30, 14.81), (8448, 0, 32.43)],
)
def test_activations_are_as_measured_on_one_h100(tokens: int, blocks: int, measured: float) -> None:
    """GiB above what lay on the card before a step: 1024² batch 1 and 2, 512² batch 8, 1328²; 128 text tokens each."""
    parts = plan("zero2", 1, checkpointed_blocks=blocks, tokens=tokens).device
    assert parts["activations"] / GIB == pytest.approx(measured, rel=0.03)


def test_what_the_engine_will_add() -> None:
    zero = ZeroPlan(2, reduce_bucket_size=50_000_000)

    def added(
        world: int = 1, zero: ZeroPlan = zero, lora_dtype: str = "bfloat16", steps: int = 1, resumed: bool = False
    ) -> int:
        return engine_bytes(zero, LORA, getattr(torch, lora_dtype), world, steps, resumed)

    assert added() == 2 * 4 * LORA + 2 * 50_000_000
    assert added(world=8, lora_dtype="float32") == LORA + 4 * 50_000_000
    assert added(resumed=True, steps=4) == 4 * LORA + 2 * 50_000_000
    assert added(zero=replace(zero, offload_optimizer=True)) == 2 * 50_000_000
    assert added(zero=replace(zero, overlap_comm=True), resumed=True) == 4 * 50_000_000


def test_cuda_graphs_take_a_second_gradient_and_float32_ones() -> None:
    """Measured on a card capped at 8 GiB: 5.4 GiB after capturing, 6.4 in the optimizer's first step."""
    with_graphs = plan("zero2", 1, tabulated=True, cuda_graphs=True)
    without = plan("zero2", 1, tabulated=True)
    assert without.device["CUDA graphs"] == 0
    assert with_graphs.device["CUDA graphs"] == LORA * (2 * 2 + 4) + (128 << 20)
    assert with_graphs.bytes - without.bytes == with_graphs.device["CUDA graphs"]
