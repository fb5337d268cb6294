"""The trainer's command line: one flag for each field of TrainConfig, over a YAML file, over the defaults."""

import argparse
import dataclasses
import os
import sys
from pathlib import Path
from typing import Any

from train.config.check_paths import find_deepspeed
from train.config.train_config import COMMA_LISTS, HEADINGS, HINTS, REQUIRED, TrainConfig
from train.config.typed_fields import FlagParser, add_flag, convert, did_you_mean, read_yaml


def build_parser() -> argparse.ArgumentParser:
    """The flags of train_lora.py: one for each field of TrainConfig; their values stay text until `parse`."""
    parser = FlagParser(
        prog="train_lora.py",
        usage="deepspeed train/train_lora.py --deepspeed ds_configs/zero2.json --model MODEL --data SHARDS "
        "--output_path RUN [--config RUN.YAML] [flags]",
        description="Train a LoRA for Qwen-Image under DeepSpeed.",
        argument_default=argparse.SUPPRESS,
        allow_abbrev=False,
    )
    parser.add_argument("--config", metavar="RUN.YAML", help="file of these options; flags override it")
    parser.add_argument("--local_rank", "--local-rank", help=argparse.SUPPRESS)  # the launcher passes it
    group = parser.add_argument_group("")
    for field in dataclasses.fields(TrainConfig):
        if field.name in HEADINGS:
            group = parser.add_argument_group(HEADINGS[field.name])
        add_flag(group, field.name, HINTS[field.name], shown_default(field), field.name in COMMA_LISTS)
    return parser


def shown_default(field: dataclasses.Field[Any]) -> str:
    """A field's default as --help shows it; empty for None, whose help text says what "not given" means."""
    if field.default is dataclasses.MISSING:
        return "required"
    if field.default is None:
        return ""
    return ",".join(field.default) if isinstance(field.default, tuple) else str(field.default)


def parse(argv: list[str] | None = None) -> TrainConfig:
    """The configuration from flags (default: `sys.argv`) over the YAML file of `--config` over the defaults.

    Of the pair max_steps / num_epochs a flag replaces whichever the file holds.
    Raises ValueError or FileNotFoundError with one line for unknown, missing, badly typed or contradicting options.
    """
    known, unknown = build_parser().parse_known_args(sys.argv[1:] if argv is None else argv)
    if unknown:
        flag = unknown[0].split("=")[0]
        guess = did_you_mean(flag.lstrip("-"), HINTS).replace("mean ", "mean --")
        raise ValueError(f"unknown flag {flag}{guess}" if flag.startswith("-") else f"unexpected argument {flag!r}")
    flags = vars(known)
    flags.pop("local_rank", None)
    file = flags.pop("config", None)
    values = read_yaml(Path(file).expanduser(), HINTS, COMMA_LISTS) if file else {}
    for name, text in flags.items():
        try:
            flags[name] = convert(text, HINTS[name], name in COMMA_LISTS)
        except ValueError as error:
            raise ValueError(f"--{name} {error}") from None
    if "max_steps" in flags or "num_epochs" in flags:
        values = {name: value for name, value in values.items() if name not in ("max_steps", "num_epochs")}
    values |= flags
    missing = [f"--{name}" for name in REQUIRED if name not in values]
    if missing:
        raise ValueError(f"missing {', '.join(missing)}: give the flag, or the name in a file for --config")
    given, values["deepspeed"] = values["deepspeed"], find_deepspeed(values["deepspeed"])
    if values["deepspeed"] != given and os.environ.get("RANK", "0") == "0":
        print(f"deepspeed: no {given} here, so this project's own is taken: {values['deepspeed']}")
    return TrainConfig(**values)
