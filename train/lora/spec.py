"""The shape of a LoRA or a LoKr: which layers, rank, scale, variant."""

import math
from dataclasses import asdict, dataclass
from typing import Any, Literal

from train.config.train_config import TrainConfig
from train.lora.targets import expand_groups

ADAPTER = "default"  # PEFT's name of the one adapter
LOKR_ALONE = ("type", "factor", "decompose_both")


@dataclass(frozen=True)
class LoraSpec:
    """The shape of a LoRA. `scale` is what lora_B·lora_A (of a LoKr: w1 ⊗ w2) is multiplied with.

    `factor`, `decompose_both`: of a LoKr alone (train/lora/lokr.py).
    """

    target_modules: tuple[str, ...]
    rank: int
    alpha: float
    dropout: float = 0.0
    rslora: bool = False
    dora: bool = False
    type: Literal["lora", "lokr"] = "lora"
    factor: int = -1
    decompose_both: bool = False

    @classmethod
    def from_config(cls, config: TrainConfig) -> "LoraSpec":
        return cls(
            expand_groups(config.lora_target_modules),
            config.lora_rank,
            config.alpha,
            config.lora_dropout,
            config.lora_rslora,
            config.lora_dora,
            config.lora_type,
            config.lokr_factor,
            config.lokr_decompose_both,
        )

    def identity(self) -> dict[str, Any]:
        """What a checkpoint remembers of the LoRA: another one has other weights. JSON, a LoRA's as before there was LoKr."""
        own = {**asdict(self), "target_modules": sorted(self.target_modules)}
        return {"lora": {name: value for name, value in own.items() if self.is_lokr or name not in LOKR_ALONE}}

    def line(self, layers: int, trainable: int) -> str:
        """For people, before step 0."""
        scale = f"scale {self.scale:g}"
        if self.alpha != self.rank:
            root = "√" if self.rslora else ""
            usual = math.sqrt(self.rank) if self.rslora else 1
            scale += f" (lora_alpha {self.alpha:g} / {root}{self.rank}; lora_alpha {self.rank} would give {usual:g})"
        kind = "LoRA"
        if self.is_lokr:
            kind, of = "LoKr", " (about the square root of each side)" if self.factor == -1 else ""
            scale = f"factor {self.factor}{of}, {scale}"
        return f"{kind} of rank {self.rank}, {scale}, on {layers} layers: {trainable:,} trainable parameters"

    @property
    def is_lokr(self) -> bool:
        return self.type == "lokr"

    @property
    def scale(self) -> float:
        return self.alpha / math.sqrt(self.rank) if self.rslora else self.alpha / self.rank
