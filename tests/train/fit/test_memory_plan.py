"""The memory plan: what it counts, where it puts things, and what it refuses."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from qwen_image.model.sizes import TransformerConfig
from train.config.train_config import TrainConfig
from train.fit import memory_plan as memory
from train.fit.memory_plan import EncoderSizes, MemoryPlan, engine_bytes, plan_memory
from train.process.free_memory import GIB

ROOT = Path(__file__).resolve().parents[3]
QWEN, LORA = 20_430_401_088, 23_592_960 * 2
ENCODERS = EncoderSizes(7_070_000_000, 127_000_000)


def plan(
    file: str, world: int = 1, monkeypatch: Any = None, card: int = 80, host: int = 1000, **options: Any
) -> MemoryPlan:
    """A plan for GPUs of `card` GiB and hosts of `host` GiB, 1024² at batch size 1."""
    monkeypatch.setattr(memory, "device_bytes", lambda device: card * GIB)
    monkeypatch.setattr(memory, "host_bytes", lambda: host * GIB)
    encoders, blocks = options.pop("encoders", None), options.pop("checkpointed_blocks", 60)
    tokens = options.pop("tokens", 4096 + 128)
    config = TrainConfig(model="a/b", data="d", deepspeed=Path("d"), output_path=Path("o"), **options)
    settings = json.loads((ROOT / "ds_configs" / f"{file}.json").read_text())
    return plan_memory(
        config,
        settings,
        TransformerConfig(),
        base=2 * QWEN,
        trainable=LORA,
        tokens=tokens,
        checkpointed_blocks=blocks,
        world=world,
        local_world=world,
        encoders=encoders,
        device=torch.device("cuda"),
    )


def test_stage_2_keeps_the_base_on_every_card(monkeypatch: pytest.MonkeyPatch) -> None:
    two = plan("zero2", 8, monkeypatch)
    assert two.device["base"] == 2 * QWEN and not two.host
    two.check()
    with pytest.raises(ValueError, match=r"on each GPU, which has 24\.0: use more GPUs"):
        plan("zero2", 8, monkeypatch, card=24).check()


def test_stage_3_divides_the_base(monkeypatch: pytest.MonkeyPatch) -> None:
    three = plan("zero3", 8, monkeypatch)
    assert three.device["base"] == pytest.approx(2 * QWEN / 8, abs=8)
    assert three.device["gathered blocks"] == 2 * 1_350_000_000
    # autograd keeps the weights of blocks that are not recomputed
    assert plan("zero3", 8, monkeypatch, checkpointed_blocks=30).device["gathered blocks"] == QWEN
    plan("zero3", 8, monkeypatch, card=24).check()


def test_offload_needs_host_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    offload = plan("zero3_offload", 4, monkeypatch)
    assert offload.host["base"] == pytest.approx(2 * QWEN, abs=64) and "base" not in offload.device
    assert "AdamW" in offload.host
    offload.check()
    with pytest.raises(ValueError, match=r"offloading takes 3\d\.\d GiB of host memory .* but 16\.0 are free"):
        plan("zero3_offload", 4, monkeypatch, host=16).check()
    parked = plan("zero2", 1, monkeypatch, offload_activations=True)
    assert parked.host["activations"] == 60 * 4224 * 3072 * 2


@pytest.mark.parametrize(
    "card,option,place", [(80, "auto", "device"), (48, "auto", "swap"), (80, "swap", "swap"), (80, "cpu", "cpu")]
)
def test_encoders_go_where_there_is_room(monkeypatch: pytest.MonkeyPatch, card: int, option: str, place: str) -> None:
    chosen = plan("zero2", 1, monkeypatch, card=card, encoders=ENCODERS, encoder_device=option)
    assert chosen.encoders == place
    on_card = {"device": 2 * sum(ENCODERS), "swap": 2 * ENCODERS.vae, "cpu": 0}[place]
    assert chosen.device.get("encoders", 0) + chosen.device.get("VAE", 0) == on_card


def test_lines_add_up(monkeypatch: pytest.MonkeyPatch) -> None:
    offload = plan("zero3_offload", 2, monkeypatch, card=1)
    lines = offload.lines()
    assert lines[0].startswith("memory on each GPU of 1 GiB (activations estimated") and lines[2].startswith(
        "warning: "
    )
    assert lines[0].endswith(f"= {sum(offload.device.values()) / GIB:.2f} GiB") and "base 38.05" in lines[1]


@pytest.mark.parametrize(
    "tokens,blocks,measured",
    [(4224, 0, 16.25), (4224, 60, 1.90), (9216, 0, 35.34), (9216, 60, 3.97), (7017, 30, 14.81), (8448, 0, 32.43)],
)
def test_activations_are_as_measured_on_one_h100(
    monkeypatch: pytest.MonkeyPatch, tokens: int, blocks: int, measured: float
) -> None:
    """GiB above what lay on the card before a step: 1024² batch 1 and 2, 512² batch 8, 1328²; 128 text tokens each."""
    parts = plan("zero2", 1, monkeypatch, checkpointed_blocks=blocks, tokens=tokens).device
    assert parts["activations"] / GIB == pytest.approx(measured, rel=0.03)


def test_what_the_engine_will_add() -> None:
    zero: dict[str, Any] = {"reduce_bucket_size": 50_000_000}

    def added(world: int = 1, resumed: bool = False, settings: dict[str, Any] = zero, **options: Any) -> int:
        config = TrainConfig(model="a/b", data="d", deepspeed=Path("d"), output_path=Path("o"), **options)
        return engine_bytes({"zero_optimization": settings}, LORA, config, world, resumed)

    assert added() == 2 * 4 * LORA + 2 * 50_000_000
    assert added(world=8, lora_dtype="float32") == LORA + 4 * 50_000_000
    assert added(resumed=True, gradient_accumulation_steps=4) == 4 * LORA + 2 * 50_000_000
    assert added(settings=zero | {"offload_optimizer": {"device": "cpu"}}) == 2 * 50_000_000
    assert added(settings=zero | {"overlap_comm": True}, resumed=True) == 4 * 50_000_000
