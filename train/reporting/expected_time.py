"""How long a run will take, where that is known: from an earlier run on the same hardware, or this project's measurements.

Runs beside the run folder (and the run folder's own earlier start) are compared by the facts of their first event
(start_facts.py): same device and number of ranks, same base and LoRA. Tokens of a step may differ: its time is then scaled by
them, which a step's time nearly follows (512² takes 0.26 of 1024², which has 0.26 of its tokens: bench/LOG.md).
"""

from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

from train.fit.memory_plan import Setup
from train.fit.step_time import step_seconds
from train.reporting.run_record import RunRecord, read_run

NEWEST = 20  # runs that are looked at
FEWEST_ROWS = 3  # of a run whose speed is believed
MEASURED_ON, MEASURED_TOKENS = "H100", 4096 + 128  # what step_seconds tells of
SAME = (
    ("hardware", "device"),
    ("hardware", "ranks"),
    ("base", "precision"),
    ("base", "blocks"),
    ("base", "resident_blocks"),
    ("base", "zero_stage"),
    ("data", "encoded"),
    ("lora", "groups"),
)


class Expectation(NamedTuple):
    """Seconds of an optimizer step and of what comes before the first one (None: nobody knows), and who says so."""

    step: float
    start: float | None
    source: str


def expected_time(output: Path, facts: dict[str, Any], setup: Setup, accumulation: int) -> Expectation | None:
    """For a run of these `facts` (start_facts.py) into `output`; None where nothing is known of its like."""
    tokens = facts["tokens"] * accumulation
    for folder in runs_beside(output):
        try:
            run = read_run(folder, rows=False)
        except OSError:
            continue
        if not alike(run.facts, facts) or run.config.get("optimizer", "adamw") != setup.optimizer.name:
            continue
        run = read_run(folder)
        seconds = run.series.get("seconds_per_step")
        if seconds is None or len(seconds) < FEWEST_ROWS:
            continue
        ratio = tokens / tokens_of(run) if tokens_of(run) else 1.0
        scaled = "" if abs(ratio - 1) < 0.01 else f", its {median(seconds.values):.3g} s scaled by tokens"
        start = sum(run.start.values()) if run.start else None
        return Expectation(median(seconds.values) * ratio, start, f"as {run.name} on the same hardware{scaled}")
    return measured(facts, setup, tokens)


def measured(facts: dict[str, Any], setup: Setup, tokens: float) -> Expectation | None:
    """From the numbers of train/fit/step_time.py, which are an H100's with the full-size model."""
    full_size = setup.base.blocks == 60 and setup.base.empty.config.inner_dim == 3072
    if MEASURED_ON not in str(facts["hardware"]["device"]) or not full_size:
        return None
    besides = "" if setup.encoders is None else "; encoding comes on top"
    besides += f"; with AdamW: {setup.optimizer.label} takes longer" if setup.optimizer.name != "adamw" else ""
    seconds = step_seconds(setup) * tokens / MEASURED_TOKENS
    return Expectation(seconds, None, f"from this project's measurements on H100s{besides}")


def runs_beside(output: Path) -> list[Path]:
    """The run folder itself and others in the same folder, the newest first."""
    try:
        found = {path.parent for path in output.absolute().parent.glob("*/events.jsonl")}
        return sorted(found, key=lambda folder: -(folder / "events.jsonl").stat().st_mtime)[:NEWEST]
    except OSError:
        return []


def alike(one: dict[str, Any], other: dict[str, Any]) -> bool:
    """Whether two runs' facts agree in what decides the time of a token."""

    def value(facts: dict[str, Any], names: tuple[str, str]) -> Any:
        part = facts.get(names[0])
        return part.get(names[1]) if isinstance(part, dict) else None

    return all(value(one, names) is not None and value(one, names) == value(other, names) for names in SAME)


def tokens_of(run: RunRecord) -> float:
    """Of an optimizer step on each rank, at its largest micro-batch; 0 where it isn't told."""
    tokens, accumulation = run.facts.get("tokens"), run.config.get("gradient_accumulation_steps", 1)
    numbers = isinstance(tokens, int) and isinstance(accumulation, int)
    return float(tokens * accumulation) if numbers else 0.0
