"""Run folders as training leaves them, made without training: rows, events, options and sample images of known content."""

import json
import math
from pathlib import Path
from typing import Any

from PIL import Image

from train.config.train_config import TrainConfig
from train.watching.image_grid import save_png

SIGMAS = (0.1, 0.5, 0.9)
HOSTILE = "</script><script>alert(1)</script> <b>& \u2028 \u202e é"
FACTS: dict[str, Any] = {
    "hardware": {"device": "NVIDIA H100 80GB HBM3", "device_bytes": 80 * 2**30, "ranks": 2, "ranks_a_host": 2},
    "data": {
        "name": "encoded",
        "encoded": True,
        "fingerprint": "f" * 64,
        "samples": 36,
        "held_out": 4,
        "buckets": [[64, 64, 20], [96, 64, 16]],
        "micro_batches": 8,
    },
    "lora": {"trainable": 4096, "groups": {"attention, image": {"layers": 4, "parameters": 4096}}},
    "base": {"precision": "bfloat16", "blocks": 2, "resident_blocks": 2, "zero_stage": 2},
    "memory": {"device": {"base": 40 * 2**30, "AdamW": 2**20}, "host": {}},
    "tokens": 100,
    "steps": 100,
    "global_batch": 4,
}


def write_run(folder: Path, steps: int = 100, samples: int = 5, **options: Any) -> Path:
    """A run of so many steps with a row each; validations each tenth, lowest at 60 %; so many steps have sample images."""
    folder.mkdir(parents=True)
    values: dict[str, Any] = {
        "model": "models/tiny",
        "data": "encoded",
        "deepspeed": "zero2.json",
        "output_path": folder,
    }
    config = TrainConfig(**(values | {"max_steps": steps, "lora_rank": 8} | options))
    (folder / "config.yaml").write_text(config.to_yaml(), encoding="utf-8")
    (folder / "versions.json").write_text(json.dumps({"torch": "2.13.0", "command": ["train_lora.py"]}))
    rows = [{"step": 1, "start": {"imports": 4.0, "first step": 12.0}, "compiler": {}}, *validation(0, steps)]
    for step in range(1, steps + 1):
        loss = 1 + math.exp(-step / steps * 3)
        speed = {"seconds_per_step": 0.5, "samples_per_second": 8.0}
        rows.append(
            {"step": step, "loss": loss, "lr": 1e-4, "grad_norm": 0.1 + 0.001 * (step % 7), "epoch": step / 8} | speed
        )
        if step % max(1, steps // 10) == 0:
            rows += validation(step, steps)
    write_lines(folder / "metrics.jsonl", rows)
    events = [
        {"time": "2026-01-01T10:00:00+00:00", "step": 0, "event": "start", "text": "training begins", "facts": FACTS},
        {"time": "2026-01-01T10:00:20+00:00", "step": steps // 2, "event": "skip", "text": f"step left out: {HOSTILE}"},
        {"time": "2026-01-01T10:00:30+00:00", "step": steps // 2, "event": "warning", "text": "warning: odd"},
        {"time": "2026-01-01T10:00:40+00:00", "step": steps, "event": "note", "text": "only a note"},
        {
            "time": "2026-01-01T10:01:00+00:00",
            "step": steps,
            "event": "end",
            "text": "done",
            "exit_code": 0,
            "peak_bytes": 2**30,
        },
    ]
    write_lines(folder / "events.jsonl", events)
    (folder / "lora-60.safetensors").write_bytes(b"x" * 1000)
    (folder / "lora.safetensors").write_bytes(b"x" * 1000)
    write_samples(folder, [round(place * steps / max(1, samples - 1)) for place in range(samples)])
    return folder


def validation(step: int, steps: int) -> list[dict[str, float]]:
    """A row of validation; above its lowest from 60 % of the steps on."""
    losses = {f"validation_loss/sigma_{sigma}": sigma + (step / steps - 0.6) ** 2 for sigma in SIGMAS}
    return [{"step": step, "validation_loss": sum(losses.values()) / len(losses)} | losses]


def write_lines(path: Path, rows: list[dict[str, Any]]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def write_samples(folder: Path, steps: list[int], prompts: tuple[str, ...] = ("a blue circle", HOSTILE)) -> None:
    """Pictures of one color a step: red grows with the step."""
    for step in steps:
        place = folder / "samples" / f"step-{step:08d}"
        for number, prompt in enumerate(prompts):
            color = (min(255, step), 80 * number, 60)
            save_png(place / f"{number:02d}.png", Image.new("RGB", (48, 32), color), {"prompt": prompt, "step": step})
        Image.new("RGB", (100, 100)).save(place / "grid.png")
