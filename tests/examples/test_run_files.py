"""examples/*.yaml: each is what the trainer takes, on the ranks that its comments speak of."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from train.config.command_line import parse
from train.config.deepspeed_json import load_deepspeed_config
from train.config.train_config import HINTS

ROOT = Path(__file__).resolve().parents[2]
EXAMPLES = sorted((ROOT / "examples").glob("*.yaml"))
MACHINES = {  # ranks, and the ZeRO stage
    "one_24gb_card": (1, 2),
    "one_80gb_card": (1, 2),
    "edit": (1, 2),
    "eight_gpus_zero2": (8, 2),
    "zero3": (4, 3),
    "prodigy": (1, 2),
}


def test_there_is_one_for_each_kind_of_machine():
    assert {example.stem for example in EXAMPLES} == MACHINES.keys()


@pytest.mark.parametrize("example", EXAMPLES, ids=lambda path: path.stem)
def test_the_trainer_takes_it(example: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(ROOT)  # relative paths in the file start from the working directory
    config = parse(["--config", str(example)])
    ranks, stage = MACHINES[example.stem]
    assert config.deepspeed.is_file()
    settings = load_deepspeed_config(config.deepspeed, config, ranks)
    assert settings["zero_optimization"]["stage"] == stage
    assert settings["train_batch_size"] == config.batch_size * config.gradient_accumulation_steps * ranks


@pytest.mark.parametrize("example", EXAMPLES, ids=lambda path: path.stem)
def test_its_commands_name_it_and_flags_win(example: Path, monkeypatch: pytest.MonkeyPatch):
    """The commands in the comments, as the trainer reads them (tests/test_documents.py checks those of other scripts)."""
    monkeypatch.chdir(ROOT)
    commands = re.findall(
        r"^# +(?:deepspeed|torchrun) .*?train/train_lora\.py (.*)$", example.read_text(), re.MULTILINE
    )
    assert commands
    for command in commands:
        config = parse(command.split())
        assert f"--config {example.relative_to(ROOT)}" in command
        for name, value in re.findall(r"--(\w+) (\S+)", command.replace(f"--config examples/{example.name}", "")):
            assert name in HINTS and str(getattr(config, name)) == value


def test_the_small_card_gets_what_fits_it():
    """27.2 GB of bf16 would not."""
    small = parse(["--config", str(ROOT / "examples/one_24gb_card.yaml")])
    assert small.base_precision == "float8"
    assert not small.sample_prompts  # they would bring the text encoder beside the base
