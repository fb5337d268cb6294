"""`--optimizer`: its options, torch's (or its package's) implementation over the trained weights, and what it holds."""

import contextlib
import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from train.config.optimizer_args import OPTIMIZERS, read_arguments
from train.config.train_config import TrainConfig

# Of each weight, besides its float32 master: bytes of state, and of what a step needs for a moment besides the gradient.
# Adafactor's state is a row and a column of each matrix: a byte a weight from rank 4 on.
STATE_BYTES = {"adamw": 8, "adafactor": 1, "muon": 4, "prodigy": 16, "schedulefree": 8}
WORK_BYTES = {"adamw": 0, "adafactor": 4, "muon": 0, "prodigy": 4, "schedulefree": 4}


@dataclass(frozen=True)
class Optimizer:
    """An optimizer by its name and hyperparameters.

    AdamW (decoupled weight decay, arXiv:1711.05101) works on one flat vector, divided over the ranks. The others, and AdamW
    with two rates, get the matrices, whole on every rank (train/engine/whole_optimizer.py).

    Attributes:
        lora_plus_ratio: LoRA+ (arXiv:2402.12354): how many times the learning rate lora_B has; None: the same.
        arguments: of `--optimizer_args`, with defaults.
    """

    learning_rate: float = 1e-4
    beta1: float = 0.9
    beta2: float = 0.999
    epsilon: float = 1e-8
    weight_decay: float = 0.01
    name: str = "adamw"
    lora_plus_ratio: float | None = None
    arguments: Mapping[str, Any] = field(default_factory=dict)

    @classmethod
    def from_config(cls, config: TrainConfig) -> "Optimizer":
        arguments = read_arguments(config.optimizer, config.optimizer_args)
        if arguments.get("safeguard_warmup", False) is None:
            arguments["safeguard_warmup"] = config.lr_warmup_steps > 0
        return cls(
            config.peak_learning_rate,
            config.adam_beta1,
            config.adam_beta2,
            config.adam_epsilon,
            config.decoupled_weight_decay,
            config.optimizer,
            config.lora_plus_ratio,
            arguments,
        )

    @property
    def whole(self) -> bool:
        """Whether it works on matrices, whole on every rank."""
        return self.name != "adamw" or self.lora_plus_ratio is not None

    @property
    def label(self) -> str:
        """For people."""
        return OPTIMIZERS[self.name].label

    def line(self) -> str:
        """For people: the name and what it was given."""
        more = [f"{key} {value}" for key, value in self.arguments.items() if value is not None]
        if self.lora_plus_ratio is not None:
            more.append(f"LoRA+: {self.lora_plus_ratio:g} times that for lora_B")
        rate = f"{self.learning_rate:g}" + (" times its own estimate" if self.name == "prodigy" else "")
        return f"{self.label}, learning rate {rate}, weight decay {self.weight_decay:g}" + "".join(
            f", {m}" for m in more
        )

    def warnings(self) -> list[str]:
        """For people: a rate at which LoRAs break or learn nothing, and Adam's options where they do nothing."""
        (low, high), best, rate = OPTIMIZERS[self.name].usual, OPTIMIZERS[self.name].learning_rate, self.learning_rate
        found, usual = [], "1e-5 … 1e-3" if best == 1e-4 else f"{best:g}"
        if self.arguments.get("adjust_lr_fn") == "original":
            high, usual = 1.0, "1e-3 … 2e-2"
        if rate * (self.lora_plus_ratio or 1) > high:
            times = f" × {self.lora_plus_ratio:g}" if self.lora_plus_ratio else ""
            found.append(
                f"warning: learning rate {rate:g}{times} is far above {self.label}'s usual {usual}: LoRAs break at such rates"
            )
        if rate < low:
            found.append(
                f"warning: learning rate {rate:g} is far below {self.label}'s usual {usual}: little will be learned"
            )
        plain = Optimizer()
        if self.name == "adafactor" and (self.beta1, self.beta2, self.epsilon) != (
            plain.beta1,
            plain.beta2,
            plain.epsilon,
        ):
            found.append(
                "warning: --adam_beta1, --adam_beta2 and --adam_epsilon do nothing under --optimizer adafactor"
            )
        return found

    def identity(self) -> dict[str, Any]:
        """What a checkpoint remembers, since another optimizer's state can't be gone on with; nothing for AdamW. JSON."""
        if self.name == "adamw":
            return {}
        return {"optimizer": self.name + (" with lora_plus_ratio" if self.lora_plus_ratio is not None else "")}

    # ── what it holds ───────────────────────────────────────────────────────────────────────────────────────────────

    def bytes(self, trainable: int, world: int) -> int:
        """Of each rank for `trainable` weights: masters, state, and what a step needs besides."""
        share = 4 * -(-trainable // world)
        if not self.whole:
            return 3 * share
        return share + trainable * (4 + STATE_BYTES[self.name]) + self.step_bytes(trainable)

    def state_bytes(self, trainable: int, world: int) -> int:
        """Of it, what the first step creates."""
        return trainable * STATE_BYTES[self.name] if self.whole else 2 * 4 * -(-trainable // world)

    def step_bytes(self, trainable: int) -> int:
        """Of it, what is there during a step alone: a whole gradient, and the arithmetic's."""
        return trainable * (4 + WORK_BYTES[self.name]) if self.whole else 0

    @property
    def saved_tensors(self) -> int:
        """How many float32 numbers of each weight a checkpoint holds, schedule-free's average included."""
        return 1 + -(-STATE_BYTES[self.name] // 4) + (self.name == "schedulefree")

    # ── implementations ─────────────────────────────────────────────────────────────────────────────────────────────

    def build(self, parameters: Sequence[nn.Parameter], on_cpu: bool = False) -> torch.optim.AdamW:
        """torch's AdamW over `parameters`, as one fused kernel on a GPU; DeepSpeed's own would compile C++ or CUDA at start.

        `on_cpu`: ZeRO offloads it, so its arithmetic is the CPU's.
        """
        return self._adamw(parameters, fused=parameters[0].is_cuda and not on_cpu)

    def build_whole(self, matrices: Mapping[str, nn.Parameter], flat: nn.Parameter) -> list[torch.optim.Optimizer]:
        """Over float32 masters, the `matrices` by name; `flat` has all of them in one, for arithmetic that knows no shapes.

        Each group tells by `times` how many times the learning rate it has. Muon leaves vectors (DoRA's magnitudes) to AdamW,
        as torch says it should be: two optimizers then.
        """
        if self.name == "prodigy":  # one tensor, because it waits for the device twice for each
            return [self._prodigy([{"params": [flat], "times": 1.0}])]
        groups = self._groups(matrices)
        if self.name == "adafactor":
            return [self._adafactor(groups, flat.is_cuda)]
        if self.name == "schedulefree":
            return [self._schedulefree(groups)]
        if self.name == "muon":
            kinds = (
                self._groups({n: p for n, p in matrices.items() if p.ndim == 2}),
                self._groups({n: p for n, p in matrices.items() if p.ndim != 2}),
            )
            found: list[torch.optim.Optimizer] = [self._muon(kinds[0])]
            return [*found, self._adamw(kinds[1], flat.is_cuda)] if kinds[1] else found
        return [self._adamw(groups, flat.is_cuda)]

    def _groups(self, matrices: Mapping[str, nn.Parameter]) -> list[dict[str, Any]]:
        """Parameter groups: of LoRA+ two, for lora_B and for the rest; none is empty."""
        if self.lora_plus_ratio is None:
            groups = [{"params": [*matrices.values()], "times": 1.0}]
        else:
            ups = [parameter for name, parameter in matrices.items() if ".lora_B." in name]
            rest = [parameter for name, parameter in matrices.items() if ".lora_B." not in name]
            groups = [{"params": rest, "times": 1.0}, {"params": ups, "times": self.lora_plus_ratio}]
        return [group for group in groups if group["params"]]

    def _adamw(self, parameters: Any, fused: bool) -> torch.optim.AdamW:
        return torch.optim.AdamW(
            parameters,
            lr=self.learning_rate,
            betas=(self.beta1, self.beta2),
            eps=self.epsilon,
            weight_decay=self.weight_decay,
            fused=fused,
        )

    def _adafactor(self, groups: Any, on_gpu: bool) -> torch.optim.Adafactor:
        own = self.arguments
        return torch.optim.Adafactor(
            groups,
            lr=self.learning_rate,
            beta2_decay=own["beta2_decay"],
            eps=(None, own["smallest_scale"]),
            d=own["clipping_threshold"],
            weight_decay=self.weight_decay,
            foreach=True if on_gpu else None,  # hundreds of small matrices: fewer launches
        )

    def _muon(self, groups: Any) -> torch.optim.Muon:
        return torch.optim.Muon(groups, lr=self.learning_rate, weight_decay=self.weight_decay, **self.arguments)

    def _prodigy(self, groups: Any) -> torch.optim.Optimizer:
        from prodigyopt import Prodigy

        own = dict(self.arguments)
        if own["growth_rate"] is None:
            own["growth_rate"] = float("inf")
        common = {"betas": (self.beta1, self.beta2), "eps": self.epsilon, "weight_decay": self.weight_decay}
        with contextlib.redirect_stdout(io.StringIO()):  # it prints, on every rank
            return Prodigy(groups, lr=self.learning_rate, **common, **own)

    def _schedulefree(self, groups: Any) -> torch.optim.Optimizer:
        from schedulefree import AdamWScheduleFree

        common = {"betas": (self.beta1, self.beta2), "eps": self.epsilon, "weight_decay": self.weight_decay}
        optimizer = AdamWScheduleFree(groups, lr=self.learning_rate, **common, **self.arguments)
        optimizer.train()  # and stays so: its average is computed beside (WholeOptimizer.averages)
        return optimizer


def applied_rate(engine: Any) -> float:
    """The learning rate of the engine's last step; Prodigy's times its estimate d."""
    group = engine.optimizer.param_groups[0]
    return group["lr"] * group.get("d", 1.0)


def restore_counters(optimizer: torch.optim.Optimizer, parameter: torch.Tensor, counters: Mapping[str, float]) -> None:
    """Set the steps that an optimizer counts for a parameter; where they don't exist yet, as itself would make them.

    A float is a tensor's value, on the device if the arithmetic is fused; an int is an int.
    """
    on_device = optimizer.param_groups[0].get("fused") or optimizer.param_groups[0].get("capturable")
    for key, value in counters.items():
        device = parameter.device if on_device else torch.device("cpu")
        kept = value if isinstance(value, int) else torch.tensor(value, dtype=torch.float32, device=device)
        optimizer.state[parameter][key] = kept
