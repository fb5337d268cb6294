"""The shape of a LoRA: which layers, rank, scale, variant."""

import math
from dataclasses import asdict, dataclass
from typing import Any

from train.config.train_config import TrainConfig
from train.lora.targets import expand_groups

ADAPTER = "default"  # PEFT's name of the one adapter


@dataclass(frozen=True)
class LoraSpec:
    """The shape of a LoRA. `scale` is what lora_B·lora_A is multiplied with."""

    target_modules: tuple[str, ...]
    rank: int
    alpha: float
    dropout: float = 0.0
    rslora: bool = False
    dora: bool = False

    @classmethod
    def from_config(cls, config: TrainConfig) -> "LoraSpec":
        return cls(
            expand_groups(config.lora_target_modules),
            config.lora_rank,
            config.alpha,
            config.lora_dropout,
            config.lora_rslora,
            config.lora_dora,
        )

    def identity(self) -> dict[str, Any]:
        """What a checkpoint remembers of the LoRA: another one has other weights. JSON."""
        return {"lora": {**asdict(self), "target_modules": sorted(self.target_modules)}}

    def line(self, layers: int, trainable: int) -> str:
        """For people, before step 0."""
        scale = f"scale {self.scale:g}"
        if self.alpha != self.rank:
            root = "√" if self.rslora else ""
            usual = math.sqrt(self.rank) if self.rslora else 1
            scale += f" (lora_alpha {self.alpha:g} / {root}{self.rank}; lora_alpha {self.rank} would give {usual:g})"
        return f"LoRA of rank {self.rank}, {scale}, on {layers} layers: {trainable:,} trainable parameters"

    @property
    def scale(self) -> float:
        return self.alpha / math.sqrt(self.rank) if self.rslora else self.alpha / self.rank
