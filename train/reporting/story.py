"""A run in one paragraph, its verdict and its headline numbers."""

import math
from datetime import datetime
from statistics import median
from typing import Any, Literal, NamedTuple

from files.shown import shown, shown_bytes
from train.reporting.run_record import RunRecord, Series

ROSE = 1.01  # a validation loss so far above its lowest says over-training
DONE, NOT_FINITE, ASKED_TO_LEAVE = 0, 3, (85, 130)
GIB = 2**30


class Verdict(NamedTuple):
    """How it ended, for the pill beside the title."""

    text: str
    mood: Literal["good", "bad", "warn"]


def verdict(run: RunRecord) -> Verdict:
    """From the last event; runs without events are judged by their files."""
    total = run.total_steps
    of = f"step {run.last_step:,}" + (f" of {total:,}" if total and total >= run.last_step else "")
    if run.end is None:
        if (run.folder / "lora.safetensors").is_file() and not run.event_counts:
            return Verdict(f"done: {of}", "good")
        return Verdict(f"no end yet: {of}", "warn")
    code = run.end.get("exit_code")
    if code == DONE:
        return Verdict(f"done: {of}", "good")
    if code in ASKED_TO_LEAVE:
        return Verdict(f"asked to leave: {of}", "warn")
    return Verdict("not finite: " + of if code == NOT_FINITE else f"exit code {code}: {of}", "bad")


def paragraph(run: RunRecord) -> str:
    """Data, model, LoRA, hardware, result: what is known of them, in sentences."""
    sentences = [about_training(run), about_hardware(run), about_loss(run), about_validation(run)]
    return " ".join(sentence for sentence in sentences if sentence)


def about_training(run: RunRecord) -> str:
    config = run.config
    rank, model = config.get("lora_rank"), str(config.get("model", "an unknown model")).rstrip("/")
    kind = "DoRA" if config.get("lora_dora") else "LoKr" if config.get("lora_type") == "lokr" else "LoRA"
    what = f"A {kind} of rank {rank}" if rank else f"A {kind}"
    targets = config.get("lora_target_modules")
    if isinstance(targets, list) and targets:
        what += f" on {', '.join(map(str, targets[:8]))}{' …' if len(targets) > 8 else ''}"
    if trainable := run.fact("lora", "trainable"):
        what += f" ({trainable:,} trainable parameters)"
    precision = run.fact("base", "precision")
    base = f" in {precision}" if precision else ""
    samples = run.fact("data", "samples")
    data = f"the {samples:,} samples" if samples else "the samples"
    sizes = len(run.fact("data", "buckets") or [])
    names = config.get("data") or "unknown data"
    if isinstance(names, list):  # of several sets
        names = " + ".join(str(each) for each in names)
    if sizes:
        data += f" (in {sizes} size{'s' * (sizes > 1)})"
    whole = run.total_steps
    steps = f"{run.last_step:,}" + (f" of {whole:,}" if whole and whole >= run.last_step else "") + " steps"
    batch = run.fact("global_batch")
    return (
        f"{what} for “{shown(model)}”{base}, trained for {steps}"
        f"{f' of {batch:,} samples' if batch else ''} on {data} of “{shown(names)}”."
    )


def about_hardware(run: RunRecord) -> str:
    device, ranks = run.fact("hardware", "device"), run.fact("hardware", "ranks")
    speed = median_seconds(run)
    where = f"On {ranks} × {device}" if device and ranks else ""
    if speed is None:
        return f"{where}." if where else ""
    spent = f"a step took {speed:.3g} s ({duration(speed * run.last_step)} of training in all)"
    return f"{where}, {spent}." if where else f"{spent[0].upper()}{spent[1:]}."


def about_loss(run: RunRecord) -> str:
    of_subject = run.series.get("loss/subject")  # the prior's begins near 0, or wherever its pictures lie
    series = run.series.get("loss") if of_subject is None else of_subject
    if series is None or len(series) < 2:
        return ""
    whose = "" if of_subject is None else " of the subject"
    part = max(1, len(series) // 10)
    first, last = (math.fsum(values) / part for values in (series.values[:part], series.values[-part:]))
    between = f"from {first:.4g} to {last:.4g} (means of the first and the last tenth of its rows)"
    return f"The training loss{whose} went {between}."


def about_validation(run: RunRecord) -> str:
    series = run.series.get("validation_loss")
    if series is None or not len(series):
        return "No samples were held out, so nothing tells over-training but the pictures."
    lowest = min(range(len(series)), key=series.values.__getitem__)
    low, last = series.values[lowest], series.values[-1]
    text = f"On held-out samples it went from {series.values[0]:.4g} (step {series.steps[0]:.0f}) to {last:.4g}"
    if last <= ROSE * low:
        return f"{text} (step {series.steps[-1]:.0f}); it is not above its lowest, {low:.4g}: no sign of over-training."
    file = nearest_file(run, series.steps[lowest])
    use = f"; {file} is from there" if file else ""
    return (
        f"{text} (step {series.steps[-1]:.0f}), {last / low - 1:.1%} above its lowest of {low:.4g} at step "
        f"{series.steps[lowest]:.0f}: trained too long, or at too high a rate{use}."
    )


def nearest_file(run: RunRecord, step: float) -> str | None:
    """The LoRA file nearest to a step; None where there is none with a step in its name."""
    steps = []
    for path in run.folder.glob("lora-*.safetensors"):
        text = path.stem.removeprefix("lora-")
        if text.isdigit():
            steps.append(int(text))
    if not steps:
        return None
    return f"lora-{min(steps, key=lambda each: (abs(each - step), each))}.safetensors"


def median_seconds(run: RunRecord) -> float | None:
    """Of a step, over the rows; the first one, which compiles and captures, hardly counts in a median."""
    series = run.series.get("seconds_per_step")
    return median(series.values) if series is not None and len(series) else None


def tiles(run: RunRecord) -> list[tuple[str, str]]:
    """(number, what it is) of those that are known."""
    found: list[tuple[str, str]] = [(f"{run.last_step:,}", "steps")]
    for name, label in (("loss", "loss"), ("validation_loss", "validation loss")):
        if (series := run.series.get(name)) is not None and len(series):
            found.append((f"{tail_mean(series) if name == 'loss' else series.values[-1]:.4g}", label))
    if (speed := median_seconds(run)) is not None:
        found.append((f"{speed:.3g} s", "a step"))
    rates = run.series.get("samples_per_second")
    if rates is not None and len(rates):
        found.append((f"{median(rates.values):.3g}", "samples / s"))
    peak = run.end.get("peak_bytes") if run.end else None
    if isinstance(peak, int) and peak > 0:
        found.append((memory(peak), "peak memory"))
    if (took := elapsed(run)) is not None:
        found.append((took, "from start to end"))
    try:
        found.append((shown_bytes((run.folder / "lora.safetensors").stat().st_size), "LoRA file"))
    except OSError:
        pass
    return found


def memory(size: float) -> str:
    """Bytes for people, in GiB or, where they are few, in MiB."""
    return f"{size / GIB:.2f} GiB" if size >= GIB / 2 else f"{size / 2**20:.3g} MiB"


def tail_mean(series: Series) -> float:
    """The mean of the last tenth, since single rows jump."""
    part = max(1, len(series) // 10)
    return math.fsum(series.values[-part:]) / part


def elapsed(run: RunRecord) -> str | None:
    """Between the first and the last event."""
    times = [moment for event in run.events if (moment := parsed(event["time"])) is not None]
    if len(times) < 2 or (seconds := (times[-1] - times[0]).total_seconds()) < 0:
        return None
    return duration(seconds)


def parsed(text: str) -> datetime | None:
    try:
        moment = datetime.fromisoformat(text)
    except ValueError:
        return None
    return moment if moment.tzinfo else None


def duration(seconds: float) -> str:
    """For people: '42 s', '3 min 5 s', '2 h 14 min', '3 d 4 h'."""
    whole = round(seconds)
    for size, big, small_size, small in ((86400, "d", 3600, "h"), (3600, "h", 60, "min"), (60, "min", 1, "s")):
        if whole >= size:
            rest = whole % size // small_size
            return f"{whole // size} {big}" + (f" {rest} {small}" if rest else "")
    return f"{seconds:.2g} s" if seconds < 10 else f"{whole} s"


def differences(runs: list[RunRecord]) -> list[tuple[str, list[str]]]:
    """Options that are not the same in all runs, each with a value a run."""
    names = sorted({name for run in runs for name in run.config} - {"output_path", "wandb_run_name"})
    rows = [(name, [shown_option(run.config.get(name)) for run in runs]) for name in names]
    return [(name, values) for name, values in rows if len(set(values)) > 1]


def chosen_options(run: RunRecord) -> list[tuple[str, str]]:
    """Options that differ from the trainer's defaults; those that have none always."""
    from train.config.optimizer_args import OPTIMIZERS
    from train.config.train_config import DEFAULTS

    found, optimizer = [], OPTIMIZERS.get(str(run.config.get("optimizer")), OPTIMIZERS["adamw"])
    defaults = DEFAULTS | {name: getattr(optimizer, name) for name in ("learning_rate", "weight_decay")}
    for name, value in run.config.items():
        default = defaults.get(name)
        plain = list(default) if isinstance(default, tuple) else default
        if name not in defaults or shown_option(plain) != shown_option(value):
            found.append((name, shown_option(value)))
    return found


def shown_option(value: Any) -> str:
    if isinstance(value, list):
        return ", ".join(map(str, value))
    return "–" if value is None else str(value)
