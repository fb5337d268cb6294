"""The whole way with a tiny model that can draw: pictures, shards, latents, a LoRA, and what it learned.

    make demo
    python demo/run.py --output_path demo_output --steps 300

Real photographs show the preparation of data. Then a LoRA learns from 36 drawn pictures what the drawing model
(demo/drawing_model/) has never seen: a subject, the blorb, and a style, the blueprint. Every stage is the command that
you would type yourself; it is printed before it runs. Where there are no weights of the drawing model, a tiny model with
random ones stands in: the way is the same, but its pictures show nothing. Two ranks train on two CPU cores, or one rank a GPU
where there are GPUs. Exits with 1 when a stage fails or when the LoRA does not show what it should have learned.
"""

from __future__ import annotations

import argparse
import os
import shlex
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from train.make_lora import free_port, number_of_gpus

ROOT = Path(__file__).resolve().parent.parent
MARKER = ".made-by-demo"  # only a folder with this file in it is ever emptied
CPU_RANKS = 2
PHOTO_PIXELS = 256  # side of the square whose area the photographs keep
MODEL = ROOT / "demo" / "drawing_model"
SIDE = 128  # of the model's pictures in pixels
TARGETS = (  # attention and MLPs: a tiny model has little width to say something new in
    "to_q,to_k,to_v,to_out.0,add_q_proj,add_k_proj,add_v_proj,to_add_out,"
    "img_mlp.net.0.proj,img_mlp.net.2,txt_mlp.net.0.proj,txt_mlp.net.2"
)
# How the LoRA learns; the quality test in tests/demo/ uses the same.
LORA: dict[str, Any] = {
    "lora_rank": 16,
    "lora_target_modules": TARGETS,
    "learning_rate": 2e-3,
    "lr_scheduler": "cosine",
    "lr_warmup_steps": 20,
    "weight_decay": 0,
    "dtype": "float32",
    "activation_checkpointing": "none",
}
STEPS = 350


class StageFailed(Exception):
    """A command ended with an error, which stands above in its own words."""


def main(argv: list[str] | None = None) -> int:
    """Run all stages."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output_path", type=Path, default=Path("demo_output"), help="emptied first (demo_output)")
    parser.add_argument("--steps", type=int, default=STEPS, help=f"optimizer steps (default {STEPS})")
    parser.add_argument("--model", type=Path, help="folder of the drawing model (demo/drawing_model, or a stand-in)")
    arguments = parser.parse_args(argv)
    try:
        return demo(arguments.output_path.resolve(), arguments.steps, arguments.model)
    except StageFailed as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2


def demo(output: Path, steps: int, model: Path | None) -> int:
    """Run the stages one after the other into `output`; returns the exit code."""
    from demo.report import write_report

    if steps < 1:
        raise ValueError(f"--steps is {steps}, but training needs at least 1")
    stands_in = model is None and not (MODEL / "model_index.json").is_file()
    model = output / "model" if stands_in else (model or MODEL).resolve()
    if not stands_in:
        require_model(model)
    start = time.perf_counter()
    clear(output)
    if stands_in:
        print("no drawing model here yet: a tiny model with random weights stands in, whose pictures show nothing")
        stage("a tiny model of the real classes", "demo/tiny_model.py", output_path=model)
    photos, photo_shards, pictures = (output / name for name in ("photos", "photo_shards", "pictures"))
    shards, encoded, run, samples = (output / name for name in ("shards", "encoded", "run", "samples"))

    # ── Real photographs: from a folder as users have it to shards with a report ──────────────────────────────────────
    stage("photos with captions", "demo/photos.py", output_path=photos)
    stage(
        "shards of the photos",
        "data_prep/make_shards.py",
        dataset_base_path=photos,
        output_path=photo_shards,
        max_pixels=PHOTO_PIXELS * PHOTO_PIXELS,
        num_workers=2,
    )
    stage("what is in them", "data_prep/check_shards.py", str(photo_shards), report=output / "photos.html")

    # ── Something new to learn: to shards, to latents and prompt embeddings ───────────────────────────────────────────
    stage("a new subject and a new style", "demo/draw_pictures.py", output_path=pictures, side=SIDE)
    stage(
        "shards of the pictures",
        "data_prep/make_shards.py",
        dataset_base_path=pictures,
        output_path=shards,
        height=SIDE,
        width=SIDE,
        image_format="png",
        num_workers=2,
    )
    stage(
        "encoded shards",
        "data_prep/encode_shards.py",
        model=model,
        data=shards,
        output_path=encoded,
        dtype="float32",  # 30 times as fast as bfloat16 on most CPUs
    )

    # ── Training ──────────────────────────────────────────────────────────────────────────────────────────────────────
    ranks = number_of_gpus() or CPU_RANKS
    stage(
        f"LoRA training, {ranks} ranks of ZeRO-2",
        *("train/train_lora.py", "--deepspeed", "ds_configs/zero2.json"),
        launcher=["deepspeed", "--num_gpus", str(ranks), "--master_port", str(free_port())],
        model=model,
        data=encoded,
        output_path=run,
        max_steps=steps,
        batch_size=4,
        num_workers=0,
        validation_samples=4,
        validation_steps=max(1, steps // 5),
        log_steps=max(1, min(5, steps // 10)),
        save_steps=0,
        wandb_mode="offline",
        **{**LORA, "lr_warmup_steps": min(20, steps)},
    )

    # ── What the LoRA changed ─────────────────────────────────────────────────────────────────────────────────────────
    if stands_in:
        stage(
            "pictures without and with the LoRA",
            *("train/sample.py", "--compare", "--prompt", "a blorb on a red background", "--prompt", "a blue circle"),
            model=model,
            lora=run / "lora.safetensors",
            output_path=samples,
            height=SIDE,
            width=SIDE,
            num_inference_steps=8,
            dtype="float32",
        )
        return write_report(output, seconds=time.perf_counter() - start)
    stage(
        "pictures at strengths 0, 0.5 and 1",
        "demo/compare_strengths.py",
        model=model,
        lora=run / "lora.safetensors",
        output_path=samples,
        side=SIDE,
    )
    return write_report(output, seconds=time.perf_counter() - start)


def require_model(model: Path) -> None:
    """Raise FileNotFoundError when there is no drawing model, saying how to get one."""
    if not (model / "model_index.json").is_file():
        raise FileNotFoundError(
            f"no drawing model in {model}: train one with python demo/train_drawing_model.py --output_path {model}, "
            "4 minutes on a GPU"
        )


def clear(output: Path) -> None:
    """Empty a folder that an earlier demo filled, or make a new one; leave every other folder alone."""
    if output.is_dir() and any(output.iterdir()):
        if not (output / MARKER).exists():
            raise FileExistsError(f"{output} is not empty and not from an earlier demo: choose another --output_path")
        shutil.rmtree(output)
    output.mkdir(parents=True, exist_ok=True)
    (output / MARKER).touch()


def stage(title: str, script: str, *flags: str, launcher: list[str] | None = None, **options: Any) -> None:
    """Print a heading and the command, run it from the repository's root; raises StageFailed with its exit code."""
    command = [*(launcher or ["python"]), script, *flags]
    for name, value in options.items():
        command += [f"--{name}", str(value)]
    print(f"\n── {title} " + "─" * (100 - len(title)))
    print("$ " + shlex.join(word.removeprefix(f"{Path.cwd()}{os.sep}") for word in command), flush=True)
    start = time.perf_counter()
    code = subprocess.run(command, cwd=ROOT, env=environment(), check=False).returncode
    if code:
        raise StageFailed(f"the stage “{title}” ended with exit code {code}; its own message stands above")
    print(f"   {time.perf_counter() - start:.0f} s", flush=True)


def environment() -> dict[str, str]:
    """This process's environment with its own Python first on the path, and CPU threads shared among the ranks."""
    ours = str(Path(sys.executable).parent)  # holds python and deepspeed
    defaults = {
        "OMP_NUM_THREADS": str(max(1, (os.cpu_count() or 1) // CPU_RANKS)),
        "TOKENIZERS_PARALLELISM": "false",
        "PYTHONWARNINGS": "ignore::FutureWarning",  # DeepSpeed uses names that torch renamed
    }
    if not number_of_gpus():
        defaults["DS_ACCELERATOR"] = "cpu"
    return {**defaults, **os.environ, "PATH": os.pathsep.join([ours, os.environ.get("PATH", "")])}


if __name__ == "__main__":
    sys.exit(main())
