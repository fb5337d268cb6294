"""One short training run through train_lora.main, and the losses that it wrote."""

import json
from pathlib import Path

from train import train_lora

ROOT = Path(__file__).resolve().parents[2]


def train(model: Path, data: Path | str, output: Path, *more: str) -> int:
    flags = ["--deepspeed", str(ROOT / "ds_configs" / "zero2.json"), "--model", str(model), "--data", str(data)]
    flags += ["--output_path", str(output), "--dtype", "float32", "--lora_rank", "2", "--lora_target_modules", "to_q"]
    flags += ["--num_workers", "0", "--log_steps", "1", "--wandb_mode", "disabled", "--max_steps", "4", *more]
    return train_lora.main(flags)


def losses(output: Path) -> list[float]:
    rows = [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]
    return [row["loss"] for row in rows if "loss" in row]
