"""What everybody else asks of the DeepSpeed JSON: read once, typed, with DeepSpeed's own defaults."""

import json
from pathlib import Path
from typing import Any

import pytest

from train.config.zero_plan import ZeroPlan

CONFIGS = Path(__file__).resolve().parents[3] / "ds_configs"


def plan(**zero: Any) -> ZeroPlan:
    return ZeroPlan.from_settings({"zero_optimization": zero})


@pytest.mark.parametrize(
    "name,stage,param,optimizer",
    [
        ("zero2", 2, False, False),
        ("zero2_offload", 2, False, True),
        ("zero3", 3, False, False),
        ("zero3_offload", 3, True, True),
    ],
)
def test_the_four_files(name: str, stage: int, param: bool, optimizer: bool) -> None:
    settings = json.loads((CONFIGS / f"{name}.json").read_text())
    read = ZeroPlan.from_settings(settings)
    assert (read.stage, read.offload_param, read.offload_optimizer) == (stage, param, optimizer)
    assert read.partitioned == (stage == 3) and read.settings is settings
    assert read.reduce_bucket_size == settings["zero_optimization"]["reduce_bucket_size"]


def test_deepspeed_itself_divides_the_lora_alone() -> None:
    zero = {"stage": 3, "stage3_max_live_parameters": 5, "offload_param": {"device": "cpu"}, "reduce_bucket_size": 7}
    zero |= {"offload_optimizer": {"device": "cpu"}, "zero_hpz_partition_size": 2, "memory_efficient_linear": False}
    given = plan(**zero).engine_settings["zero_optimization"]
    assert given == {"stage": 2, "reduce_bucket_size": 7, "offload_optimizer": {"device": "cpu"}}


def test_what_is_left_out_is_as_deepspeed_takes_it() -> None:
    """The memory plan of a JSON without these keys was a KeyError once."""
    two, three = plan(stage=2), plan(stage=3)
    assert (two.overlap_comm, three.overlap_comm) == (False, True)
    assert two.hpz == 1 and plan(stage=3, zero_hpz_partition_size=4).hpz == 4


def test_offloading_to_nowhere_is_none() -> None:
    """An AdamW that stays on the GPU must be the fused one, whatever the block is called."""
    nowhere = plan(stage=2, offload_optimizer={"device": "none"})
    assert not nowhere.offload_optimizer
    assert plan(stage=3, offload_param={"device": "cpu"}).offload_param
    pinned = plan(stage=3, offload_param={"device": "cpu", "pin_memory": True})
    assert pinned.pin_param and not plan(stage=3, offload_param={"device": "cpu"}).pin_param


def test_buffers_of_their_own_type_are_seen() -> None:
    settings = {"zero_optimization": {"stage": 2}, "data_types": {"buffer_dtype": "bf16"}}
    assert ZeroPlan.from_settings(settings).casts_buffers and not plan(stage=2).casts_buffers
