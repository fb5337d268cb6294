"""`--optimizer` by name: the rate it begins at, the arguments it takes (`--optimizer_args`), the package it needs.

No torch here; train/engine/optimizer.py builds them. docs/levers.md tells people the same.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from importlib.util import find_spec
from typing import Annotated, Any, Literal

from annotated_types import Ge, Interval, Le

from train.config.typed_fields import NotNegative, Positive, convert, did_you_mean

Name = Literal["adamw", "adafactor", "muon", "prodigy", "schedulefree"]
Decay = Annotated[float, Interval(ge=0.0, le=0.9999999)]


@dataclass(frozen=True)
class Facts:
    """What is known of an optimizer before torch is.

    Attributes:
        label: its name for people.
        learning_rate, weight_decay: where none is given.
        usual: between which rates it is used; beyond them a warning is due.
        arguments: of `--optimizer_args`, each with its type and default; None stands for "not given".
        package: what has to be installed for it, by the extra that is named like the optimizer; None: torch has it.
    """

    label: str
    learning_rate: float
    weight_decay: float
    usual: tuple[float, float]
    arguments: Mapping[str, tuple[Any, Any]] = field(default_factory=dict)
    package: str | None = None


OPTIMIZERS: dict[str, Facts] = {
    "adamw": Facts("AdamW", 1e-4, 0.01, (0.0, 0.1)),
    # Its rate is relative to each matrix's own size: torch's default, under which lora_A moves about as by AdamW at 1e-4.
    # Weight decay, by the rate itself, would be a hundred times AdamW's: torch's default is none.
    "adafactor": Facts(
        "Adafactor",
        1e-2,
        0.0,
        (1e-3, 1.0),
        {
            "beta2_decay": (Annotated[float, Le(0.0)], -0.8),
            "clipping_threshold": (Annotated[float, Ge(1.0)], 1.0),
            "smallest_scale": (NotNegative, 1e-3),
        },
    ),
    "muon": Facts(
        "Muon",
        1e-4,
        0.01,
        (0.0, 0.1),
        {
            "momentum": (Decay, 0.95),
            "nesterov": (bool, True),
            "ns_steps": (Annotated[int, Interval(ge=1, le=99)], 5),
            # so that a rate and a decay found for AdamW serve (arXiv:2502.16982, 2.2)
            "adjust_lr_fn": (Literal["match_rms_adamw", "original"], "match_rms_adamw"),
        },
    ),
    "prodigy": Facts(
        "Prodigy",
        1.0,
        0.01,
        (0.05, 20.0),
        {
            "d_coef": (Positive, 1.0),
            "d0": (Positive, 1e-6),
            "growth_rate": (Annotated[float, Ge(1.0)] | None, None),  # None: unlimited
            "beta3": (Decay | None, None),  # None: √beta2
            "use_bias_correction": (bool, False),
            "safeguard_warmup": (bool | None, None),  # None: when there is a warm-up
        },
        "prodigyopt",
    ),
    "schedulefree": Facts(
        "schedule-free AdamW",
        1e-4,
        0.01,
        (0.0, 0.1),
        {"r": (NotNegative, 0.0), "weight_lr_power": (NotNegative, 2.0)},
        "schedulefree",
    ),
}
FLAGS = {  # what others' lists of optimizer arguments hold and is a flag here
    "lr": "--learning_rate",
    "weight_decay": "--weight_decay",
    "betas": "--adam_beta1 and --adam_beta2",
    "eps": "--adam_epsilon",
    "warmup_steps": "--lr_warmup_steps",
}


def read_arguments(optimizer: str, given: tuple[str, ...]) -> dict[str, Any]:
    """The arguments of `optimizer` by name: those `given` as key=value, checked, and the others' defaults.

    Raises ValueError for a key that it doesn't know, one that is given twice, and a value of another type.
    """
    known, found = OPTIMIZERS[optimizer].arguments, dict[str, Any]()
    for text in given:
        key, equals, value = (part.strip() for part in text.partition("="))
        if not equals or not key or not value:
            raise ValueError(f"optimizer_args takes key=value, got {text!r}")
        if key in FLAGS:
            raise ValueError(f"optimizer_args: {key} is a flag of its own: {FLAGS[key]}")
        if key not in known:
            knows = f"it knows {', '.join(known)}" if known else "it has none"
            raise ValueError(f"optimizer_args: {optimizer} has no {key}{did_you_mean(key, known)}; {knows}")
        if key in found:
            raise ValueError(f"optimizer_args: {key} is given twice")
        try:
            found[key] = convert(value, known[key][0])
        except ValueError as error:
            raise ValueError(f"optimizer_args: {key} {error}") from None
    return {key: found.get(key, default) for key, (_, default) in known.items()}


def check_package(optimizer: str) -> None:
    """Raise ValueError, with the command, where the optimizer's package is not installed."""
    package = OPTIMIZERS[optimizer].package
    if package is not None and find_spec(package) is None:
        raise ValueError(
            f"optimizer {optimizer} needs the package {package}: pip install {package} (this project's extra [{optimizer}])"
        )
