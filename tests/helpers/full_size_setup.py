"""A run of the full-size transformer as the memory plan sees it: sizes from the meta device, no weights."""

import json
from functools import cache
from pathlib import Path
from typing import Any

import torch

from qwen_image.free_memory import GIB
from qwen_image.loading.model_files import ModelSource
from qwen_image.model.sizes import TransformerConfig
from qwen_image.model.transformer import QwenImageTransformer
from train.base_model.base_home import BaseHome
from train.base_model.base_plan import BasePlan
from train.config.zero_plan import ZeroPlan
from train.fit.memory_plan import EncoderSizes, Machine, MemoryPlan, Setup, plan_memory

ROOT = Path(__file__).resolve().parents[2]
QWEN, LORA = 20_430_401_088, 23_592_960 * 2
BASE_FIELDS = ("float8", "int8", "tabulated", "can_tabulate", "open_precision", "open_home")
ENCODERS = EncoderSizes(7_070_000_000, 127_000_000)


@cache
def zero_plan(file: str) -> ZeroPlan:
    return ZeroPlan.from_settings(json.loads((ROOT / "ds_configs" / f"{file}.json").read_text()))


@cache
def full_size() -> QwenImageTransformer:
    """Qwen-Image's transformer on the meta device."""
    with torch.device("meta"):
        return QwenImageTransformer(TransformerConfig())


def setup(file: str = "zero2", world: int = 1, **options: Any) -> Setup:
    """Rank 64 on q, k and v in bf16, 1024² at batch size 1, every block checkpointed."""
    base = {
        name: options.pop(name)
        for name in ("float8", "int8", "tabulated", "can_tabulate", "open_precision", "open_home")
        if name in options
    }
    values: dict[str, Any] = {"tokens": 4096 + 128, "checkpointed_blocks": 60, "lora_dtype": torch.bfloat16}
    home = BaseHome.of(zero_plan(file), 60, options.pop("resident", None), world, world)
    return Setup(
        BasePlan(ModelSource("a/b"), full_size(), torch.bfloat16, home, **base),
        zero_plan(file),
        LORA,
        **values | {"world": world, "local_world": world} | options,
    )


def plan(file: str, world: int = 1, card: int = 80, host: int = 1000, **options: Any) -> MemoryPlan:
    """A plan for GPUs of `card` GiB and hosts of `host` GiB."""
    return plan_memory(setup(file, world, **options), Machine(card * GIB, host * GIB))
