"""What a finished demo shows: the loss curve as a picture, and the numbers with the places of the files."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

MUST_FALL_TO = 0.95  # share of the first validation loss that the last one must not exceed
MIDDLE = 8  # rows of the training loss whose mean is drawn as a smooth line


@dataclass(frozen=True)
class Course:
    """A run's losses: (step, loss) pairs of training and of validation, and the median seconds of a step."""

    training: list[tuple[int, float]]
    validation: list[tuple[int, float]]
    seconds_per_step: float | None

    @property
    def fell(self) -> bool:
        """Whether the validation loss ended visibly below where it began."""
        return self.validation[-1][1] <= MUST_FALL_TO * self.validation[0][1]


def read_course(metrics: Path) -> Course:
    """Losses from metrics.jsonl. Raises ValueError when it holds fewer than two validations, or no training loss."""
    rows = [json.loads(line) for line in metrics.read_text(encoding="utf-8").splitlines()]
    training = [(row["step"], row["loss"]) for row in rows if "loss" in row]
    validation = [(row["step"], row["validation_loss"]) for row in rows if "validation_loss" in row]
    if not training or len(validation) < 2:
        raise ValueError(f"{metrics} has {len(training)} losses and {len(validation)} validations: nothing to compare")
    speeds = sorted(row["seconds_per_step"] for row in rows if "seconds_per_step" in row)
    return Course(training, validation, speeds[len(speeds) // 2] if speeds else None)


def draw_course(course: Course, picture: Path) -> None:
    """Draw both losses over the optimizer steps into a PNG."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(8, 4.5), layout="constrained")
    steps, losses = zip(*course.training, strict=True)
    axes.plot(steps, losses, color="tab:blue", alpha=0.3, linewidth=1, label="training")
    if len(losses) > MIDDLE:
        means = [sum(losses[i - MIDDLE : i]) / MIDDLE for i in range(MIDDLE, len(losses) + 1)]
        axes.plot(
            steps[MIDDLE // 2 : MIDDLE // 2 + len(means)], means, color="tab:blue", label=f"mean of {MIDDLE} rows"
        )
    axes.plot(*zip(*course.validation, strict=True), "o-", color="tab:orange", label="validation")
    axes.set(xlabel="optimizer step", ylabel="flow-matching loss", ylim=(0, None), title="LoRA on 36 drawn pictures")
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(picture, dpi=120)
    plt.close(figure)


def shown_lines(scores: Path) -> list[tuple[str, str, Path]]:
    """How well the LoRA's pictures show what it learned; none where a model that can't draw stood in."""
    if not scores.is_file():
        return []
    found = json.loads(scores.read_text(encoding="utf-8"))
    shown = [f"{name} {found[name][0]:.0%} → {found[name][1]:.0%}" for name in ("subject", "style", "others")]
    return [("shown, base → LoRA", ", ".join(shown), scores)]


def write_report(output: Path, seconds: float) -> int:
    """Draw the curve, print the summary of the demo in `output`; returns 0, or 1 when validation did not fall."""
    course = read_course(output / "run" / "metrics.jsonl")
    picture = output / "loss.png"
    draw_course(course, picture)
    first, last = course.validation[0], course.validation[-1]
    manifest = json.loads((output / "photo_shards" / "manifest.json").read_text(encoding="utf-8"))
    buckets = [f"{bucket['width']}×{bucket['height']}" for bucket in manifest["buckets"] if bucket["count"]]
    lora = output / "run" / "lora.safetensors"
    speed = f", {course.seconds_per_step:.2f} s each" if course.seconds_per_step else ""
    photos = sum(1 for _ in (output / "photos").glob("*.txt"))
    lines = [
        ("photos", f"{photos} in {len(buckets)} sizes, {buckets[0]} … {buckets[-1]}", output / "photos.html"),
        ("pictures", f"{sum(1 for _ in (output / 'pictures').glob('*.txt'))} with captions", output / "pictures"),
        ("latents", "and prompt embeddings", output / "encoded"),
        ("training", f"{course.training[-1][0]} steps{speed}", output / "run" / "metrics.jsonl"),
        ("validation loss", f"{first[1]:.3f} at step {first[0]} → {last[1]:.3f} at step {last[0]}", picture),
        ("LoRA", f"{lora.stat().st_size / 1e6:.1f} MB", lora),
        *shown_lines(output / "samples" / "scores.json"),
        ("images", "without and with the LoRA", output / "samples" / "grid.png"),
        ("W&B, offline", "", output / "run" / "wandb"),
    ]
    for _, _, path in lines:
        if not path.exists():
            raise FileNotFoundError(f"the demo should have written {path}")
    print(f"\n── the demo in {seconds:.0f} s " + "─" * 80)
    for name, number, path in lines:
        print(f"{name:<18} {number:<48} {path}")
    if not course.fell:
        print(f"error: the validation loss did not fall to {MUST_FALL_TO:.0%} of its first value", flush=True)
        return 1
    return 0
