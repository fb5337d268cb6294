"""AdamW, the optimizer of every run: its options, and torch's implementation over the trained parameters."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import nn

from train.config.train_config import TrainConfig


@dataclass(frozen=True)
class AdamW:
    """Adam with decoupled weight decay (arXiv:1711.05101), by its hyperparameters.

    Another optimizer would be built beside `build`; train/engine/optimizer_state.py has to know its state by name then.
    """

    learning_rate: float = 1e-4
    beta1: float = 0.9
    beta2: float = 0.999
    epsilon: float = 1e-8
    weight_decay: float = 0.01

    @classmethod
    def from_config(cls, config: TrainConfig) -> "AdamW":
        return cls(config.learning_rate, config.adam_beta1, config.adam_beta2, config.adam_epsilon, config.weight_decay)

    def build(self, parameters: Sequence[nn.Parameter], on_cpu: bool = False) -> torch.optim.AdamW:
        """torch's AdamW over `parameters`, as one fused kernel on a GPU; DeepSpeed's own would compile C++ or CUDA at start.

        `on_cpu`: ZeRO offloads it, so its arithmetic is the CPU's.
        """
        return torch.optim.AdamW(
            parameters,
            lr=self.learning_rate,
            betas=(self.beta1, self.beta2),
            eps=self.epsilon,
            weight_decay=self.weight_decay,
            fused=parameters[0].is_cuda and not on_cpu,
        )
