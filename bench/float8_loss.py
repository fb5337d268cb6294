"""The loss of a LoRA run on a float8 base against one on the unquantised base, with the same seeds.

    make bench-float8
    python bench/float8_loss.py --output float8_loss                        # minutes on a GPU; a quarter of an hour on a CPU
    python bench/float8_loss.py --output float8_loss --steps 200 --layers 12 --heads 8 --side 256
    python bench/float8_loss.py --output float8_loss --lora_rank 8 --learning_rate 3e-3      # the same base once more

First a model learns from scratch on photographs (bench/learned_model.py; a later call takes it from --output), then
train/train_lora.py runs twice on photographs of other subjects: --base_precision dtype and float8. The base without a
LoRA, on the same batches, noise and σ, shows what the LoRA learned. On a GPU all is bfloat16 and float8 products are the
GPU's own; on a CPU the unquantised base is float32 and float8 is emulated: the same rounding, products summed in float32.
Prints windows of steps and the differences, draws `--output`/loss.png; exits with 1 when the difference is above 1 %.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import shutil
import sys
import time
from dataclasses import dataclass
from pathlib import Path

from bench.learned_model import Recipe, add_recipe_flags, batches, describe, losses, write_learned_model

MUST, GOAL = 0.01, 0.003  # relative difference of the mean loss
PRECISIONS = ("dtype", "float8")
WINDOW = 20  # steps whose mean is a point of the smoothed curves
END = 50  # steps at the end
WINDOWS = 8  # rows of the table
SEED = 0


@dataclass(frozen=True)
class Courses:
    """The loss of each step: LoRA on the unquantised base, LoRA on the float8 base, the unquantised base alone."""

    exact: list[float]
    float8: list[float]
    base: list[float]

    def __post_init__(self) -> None:
        assert len(self.exact) == len(self.float8) == len(self.base) > 0, "one loss of each a step"

    @property
    def overall(self) -> float:
        """Relative difference of the mean over all steps."""
        return relative(self.float8, self.exact)

    @property
    def end(self) -> float:
        """Relative difference of the mean over the last END steps."""
        return relative(self.float8[-END:], self.exact[-END:])

    @property
    def largest(self) -> tuple[float, int]:
        """The largest relative difference of means over WINDOW steps, and the step at which that window ends."""
        width = min(WINDOW, len(self.exact))
        ends = range(width, len(self.exact) + 1)
        differences = [(relative(self.float8[i - width : i], self.exact[i - width : i]), i) for i in ends]
        return max(differences, key=lambda difference: abs(difference[0]))

    @property
    def fall(self) -> float:
        """Share of the base's loss that the LoRA took away in the last END steps, on the unquantised base."""
        return -relative(self.exact[-END:], self.base[-END:])

    def lines(self) -> list[str]:
        """The table and the summary."""
        rows = ["| steps | base alone | LoRA | LoRA on float8 | difference |", "| --- | --- | --- | --- | --- |"]
        count = len(self.exact)
        windows = min(WINDOWS, count)
        for window in range(windows):
            start, stop = window * count // windows, (window + 1) * count // windows
            base, exact, float8 = (mean(course[start:stop]) for course in (self.base, self.exact, self.float8))
            rows.append(f"| {start + 1}–{stop} | {base:.5f} | {exact:.5f} | {float8:.5f} | {float8 / exact - 1:+.3%} |")
        largest, step = self.largest
        grade = "goal met" if abs(self.overall) <= GOAL else "must met" if abs(self.overall) <= MUST else "MISSED"
        return [
            *rows,
            f"difference over all {count} steps {self.overall:+.3%} (must ≤ {MUST:.1%}, goal ≤ {GOAL:.1%}: {grade})",
            f"difference over the last {min(END, count)} steps {self.end:+.3%}; "
            f"largest over {min(WINDOW, count)} steps {largest:+.3%}, up to step {step}",
            f"first step {self.float8[0] / self.exact[0] - 1:+.3%}: no LoRA yet, float8's rounding alone",
            f"the LoRA took {self.fall:.1%} off the base's loss in the last {min(END, count)} steps",
        ]


def mean(values: list[float]) -> float:
    return sum(values) / len(values)


def relative(values: list[float], reference: list[float]) -> float:
    """How far the mean of `values` lies above that of `reference`, as a share of it."""
    return mean(values) / mean(reference) - 1


def run_lora(output: Path, recipe: Recipe, precision: str, options: argparse.Namespace) -> list[float]:
    """train_lora.py on one of both bases; each step's loss."""
    from demo.run import stage

    run = output / f"run-{precision}"
    shutil.rmtree(run, ignore_errors=True)
    stage(
        f"LoRA, base_precision {precision}",
        *("train/train_lora.py", "--deepspeed", "ds_configs/zero2.json"),
        model=output / "model",
        data=output / "lora" / "encoded",
        output_path=run,
        dtype=recipe.dtype,
        base_precision=precision,
        lora_rank=options.lora_rank,
        learning_rate=options.learning_rate,
        batch_size=options.batch_size,
        max_steps=options.steps,
        seed=SEED,
        num_workers=0,
        activation_checkpointing="none",
        log_steps=1,
        save_steps=0,
        wandb_mode="disabled",
    )
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    course = [row["loss"] for row in rows if "loss" in row]
    if len(course) != options.steps or any(loss is None for loss in course):
        raise ValueError(f"{run}/metrics.jsonl holds {len(course)} losses of {options.steps} steps, or some not finite")
    return course


def base_alone(output: Path, recipe: Recipe, options: argparse.Namespace) -> list[float]:
    """The losses of the same batches, noise and σ without a LoRA."""
    import torch

    from qwen_image.loading.model_files import ModelSource, resolve_model
    from qwen_image.pipeline import load_transformer
    from train.step.flow_matching_module import FlowMatchingModule

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    dtype = getattr(torch, recipe.dtype)
    files = resolve_model(ModelSource(str(output / "model")), ("transformer",))
    module = FlowMatchingModule(load_transformer(files, dtype, device), "none", dtype)
    with torch.no_grad(), batches(output / "lora" / "encoded", options.batch_size, SEED, device) as loader:
        course = [loss for loss, _ in zip(losses(module, loader), range(options.steps), strict=False)]
    return torch.stack(course).tolist()


def draw(courses: Courses, title: str, picture: Path) -> None:
    """Both runs' losses and the base's, and their smoothed difference, into a PNG."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, (above, below) = plt.subplots(2, 1, figsize=(9, 7), sharex=True, height_ratios=(2, 1), layout="constrained")
    width = min(WINDOW, len(courses.exact))
    ends = list(range(width, len(courses.exact) + 1))

    def smooth(course: list[float]) -> list[float]:
        return [mean(course[i - width : i]) for i in ends]

    steps = range(1, len(courses.exact) + 1)
    curves = [
        ("base alone", courses.base, "tab:gray", "-"),
        ("LoRA on the unquantised base", courses.exact, "tab:blue", "-"),
        ("LoRA on the float8 base", courses.float8, "tab:orange", "--"),
    ]
    for name, course, colour, line in curves:
        above.plot(steps, course, color=colour, alpha=0.2, linewidth=0.8)
        above.plot(ends, smooth(course), line, color=colour, label=f"{name}, mean of {width} steps")
    above.set(ylabel="flow-matching loss", ylim=(0, None), title=title)
    above.legend()
    each = [100 * (float8 / exact - 1) for float8, exact in zip(courses.float8, courses.exact, strict=True)]
    smoothed = [100 * (a / b - 1) for a, b in zip(smooth(courses.float8), smooth(courses.exact), strict=True)]
    below.plot(steps, each, ".", color="tab:orange", alpha=0.3, markersize=3, label="each step")
    below.plot(ends, smoothed, color="tab:orange", label=f"of the means of {width} steps")
    below.axhspan(-100 * GOAL, 100 * GOAL, color="tab:green", alpha=0.15, label=f"goal ± {100 * GOAL:g} %")
    for sign in (-1, 1):
        below.axhline(sign * 100 * MUST, color="tab:red", linewidth=1, label=f"must ± {100 * MUST:g} %" * (sign > 0))
    below.set(xlabel="optimizer step", ylabel="difference, %")
    below.legend(loc="upper right", ncols=2, fontsize="small")
    for axes in (above, below):
        axes.grid(alpha=0.3)
    figure.savefig(picture, dpi=110)
    plt.close(figure)


def compare(options: argparse.Namespace) -> Courses:
    """Learn (or find) the base, train both LoRAs, draw and print; the courses. Raises as the stages do."""
    import torch

    start = time.perf_counter()
    if options.steps < 1:
        raise ValueError(f"--steps is {options.steps}, but training needs at least 1")
    output = options.output.resolve()
    given = {name: getattr(options, name) for name in ("layers", "heads", "side", "learning_steps")}
    cuda = torch.cuda.is_available()
    recipe = Recipe.for_device(cuda, **given)
    learned = write_learned_model(output, recipe)
    exact, float8 = (run_lora(output, recipe, precision, options) for precision in PRECISIONS)
    courses = Courses(exact, float8, base_alone(output, recipe, options))
    machine = torch.cuda.get_device_name() if cuda else "CPU, float8 emulated"
    setting = f"rank {options.lora_rank}, learning rate {options.learning_rate:g}, batch size {options.batch_size}"
    title = f"float8 base, {recipe.layers} blocks × {recipe.heads} heads, {recipe.side}², {setting}"
    (output / "courses.json").write_text(json.dumps(vars(courses)), encoding="utf-8")
    print(f"\n{machine}, torch {torch.__version__}; {describe(recipe, learned)}; LoRA: {setting}\n")
    print("\n".join(courses.lines()))
    if importlib.util.find_spec("matplotlib") is None:
        print(f"no picture: matplotlib is not installed; the losses are in {output / 'courses.json'}")
    else:
        draw(courses, title, output / "loss.png")
        print(output / "loss.png")
    print(f"{time.perf_counter() - start:.0f} s in all", flush=True)
    return courses


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--output",
        type=Path,
        default=Path("bench_output/float8_loss"),
        help="folder for everything (default bench_output/float8_loss)",
    )
    parser.add_argument("--steps", type=int, default=200, help="optimizer steps of both LoRA runs (default 200)")
    add_recipe_flags(parser)
    parser.add_argument("--lora_rank", type=int, default=32, help="rank of the LoRA (default 32)")
    parser.add_argument("--learning_rate", type=float, default=1e-3, help="of the LoRA (default 1e-3)")
    parser.add_argument("--batch_size", type=int, default=4, help="of the LoRA (default 4)")
    options = parser.parse_args(argv)
    from demo.run import StageFailed

    try:
        return int(abs(compare(options).overall) > MUST)
    except (StageFailed, ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())
