"""Runs of the trainer on a random model of five narrow blocks, from one home of the base or another."""

import json
from pathlib import Path

from train import train_lora

ROOT = Path(__file__).resolve().parents[2]


def train(common: list[str], output: Path, config: str, steps: int, *more: str) -> int:
    zero = str(ROOT / "ds_configs" / f"{config}.json")
    return train_lora.main(
        [*common, "--output_path", str(output), "--deepspeed", zero, "--max_steps", str(steps), *more]
    )


def train_all(jobs: list[tuple]) -> list[int]:
    return [train(*job) for job in jobs]


def rows(output: Path) -> list[tuple]:
    names = ("step", "loss", "grad_norm", "validation_loss")
    found = [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]
    return [tuple(row.get(name) for name in names) for row in found if "start" not in row]
