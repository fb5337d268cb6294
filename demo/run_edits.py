"""Edits the whole way with a tiny model: drawn pairs, shards, latents and prompts with pictures, a LoRA, images from sources.

    make demo-edit
    python demo/run_edits.py --output_path demo_edit_output --steps 200

The model is Qwen-Image-Edit's classes with random weights. It can't draw, so its pictures show nothing; what shows is that the
loss falls on pairs that it never saw. Every stage is the command that you would type yourself; it is printed before it runs.
Exits with 1 when a stage fails, or when the validation loss has not fallen.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from pathlib import Path

from demo.run import LORA, StageFailed, clear, stage
from train.make_lora import free_port, number_of_gpus

SIDE = 96  # of the pictures in pixels; inference has 1024
AREA = SIDE * SIDE
STEPS = 200
TARGETS = LORA["lora_target_modules"] + ",img_in,proj_out"  # a model of random weights has everything to learn


def main(argv: list[str] | None = None) -> int:
    """Run all stages."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--output_path", type=Path, default=Path("demo_edit_output"), help="emptied first (demo_edit_output)"
    )
    parser.add_argument("--steps", type=int, default=STEPS, help=f"optimizer steps (default {STEPS})")
    parser.add_argument("--model", type=Path, help="a model folder to use instead, taken for one of --family")
    parser.add_argument("--family", choices=("edit", "edit-2509", "edit-2511"), default="edit", help="(default edit)")
    arguments = parser.parse_args(argv)
    try:
        if arguments.steps < 1:
            raise ValueError(f"--steps is {arguments.steps}, but training needs at least 1")
        return demo(arguments.output_path.resolve(), arguments.steps, arguments.family, arguments.model)
    except StageFailed as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2


def demo(output: Path, steps: int, family: str, given: Path | None = None) -> int:
    """Run the stages one after the other into `output`; returns the exit code."""
    start = time.perf_counter()
    clear(output)
    names = ("model", "pairs", "shards", "encoded", "run", "samples")
    model, pairs, shards, encoded, run, samples = (output / name for name in names)
    if given is not None:
        model = given.resolve()
    else:
        stage("a tiny edit model of the real classes", "demo/tiny_model.py", output_path=model, family=family)
    stage("pairs: source/, target/ and instructions", "demo/draw_edits.py", output_path=pairs, side=SIDE)
    stage(
        "shards of pairs",
        "data_prep/make_shards.py",
        dataset_base_path=pairs,
        output_path=shards,
        max_pixels=AREA,
        source_pixels=AREA,
        image_format="png",
        num_workers=2,
    )
    report = output / "pairs.html"
    stage("what is in them", "data_prep/check_shards.py", str(shards), report=report, num_workers=0)
    stage(
        "encoded shards",
        "data_prep/encode_shards.py",
        model=model,
        model_family=family,
        data=shards,
        output_path=encoded,
        dtype="float32",
    )
    ranks = number_of_gpus() or 2
    stage(
        f"LoRA training, {ranks} ranks of ZeRO-2",
        *("train/train_lora.py", "--deepspeed", "ds_configs/zero2.json"),
        launcher=["deepspeed", "--num_gpus", str(ranks), "--master_port", str(free_port())],
        model=model,
        model_family=family,
        data=encoded,
        output_path=run,
        max_steps=steps,
        batch_size=4,
        num_workers=0,
        validation_samples=4,
        validation_steps=max(1, steps // 4),
        log_steps=max(1, min(10, steps // 10)),
        save_steps=0,
        wandb_mode="disabled",
        **{**LORA, "lora_target_modules": TARGETS, "lora_rank": 32, "lr_warmup_steps": min(20, steps)},
    )
    stage(
        "images from a source image, without and with the LoRA",
        *("train/sample.py", "--compare", "--prompt", "mirror the picture"),
        model=model,
        model_family=family,
        lora=run / "lora.safetensors",
        source_image=pairs / "source" / "000.png",
        source_pixels=AREA,
        output_path=samples,
        num_inference_steps=8,
        dtype="float32",
    )
    first, last = validation_losses(run)
    print(
        f"\nvalidation loss {first:.3f} before, {last:.3f} after {steps} steps; {time.perf_counter() - start:.0f} s in all"
    )
    print(f"pairs: {report}; images: {samples / 'grid.png'}; run: {run}")
    return int(last >= first)


def validation_losses(run: Path) -> tuple[float, float]:
    """The first and the last of a run."""
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    losses = [row["validation_loss"] for row in rows if "validation_loss" in row]
    return losses[0], losses[-1]


if __name__ == "__main__":
    sys.exit(main())
