"""What a run folder tells: options, versions, rows of metrics and events. Broken, partial and running ones tell less.

    run = read_run(Path("runs/cats"))

Only a folder that is no run at all is an error; whatever else is missing or damaged becomes a line of `remarks`.
"""

import json
import math
from array import array
from collections import Counter, deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from files.shown import shown

SERIES = 300  # different numbers of a run that are read; a row of a million made-up names can do no harm
LONGEST_ROW = 1 << 20  # bytes
FIRST_EVENTS, LAST_EVENTS = 100, 400
MARKS = 400  # steps that events stand at, for the curves
FILES = ("config.yaml", "metrics.jsonl", "events.jsonl")


@dataclass
class Series:
    """One number over the optimizer steps, as the rows give it; `lost` of them were not finite."""

    steps: array = field(default_factory=lambda: array("d"))
    values: array = field(default_factory=lambda: array("d"))
    lost: int = 0

    def __len__(self) -> int:
        return len(self.steps)


@dataclass
class RunRecord:
    """A run as far as its folder tells.

    Attributes:
        name: for people: the folder's.
        config: options by name; versions: of versions.json.
        series: by the name in metrics.jsonl; `loss/sigma_0.1` is a part of `loss`.
        rows: how many were read.
        events: the first and the last ones, each a dict with `event`, `step`, `text`, `time` where known.
        event_counts: all of them by kind.
        marks: (step, kind) of those that the curves show.
        start: seconds by name, of what came before the first step of the latest start (rows with a `start`).
        remarks: for people: what is missing or damaged.
    """

    folder: Path
    name: str
    config: dict[str, Any] = field(default_factory=dict)
    versions: dict[str, Any] = field(default_factory=dict)
    series: dict[str, Series] = field(default_factory=dict)
    rows: int = 0
    events: list[dict[str, Any]] = field(default_factory=list)
    event_counts: Counter[str] = field(default_factory=Counter)
    marks: list[tuple[float, str]] = field(default_factory=list)
    facts: dict[str, Any] = field(default_factory=dict)
    start: dict[str, float] = field(default_factory=dict)
    remarks: list[str] = field(default_factory=list)
    end: dict[str, Any] | None = None
    _late: deque[dict[str, Any]] = field(default_factory=lambda: deque(maxlen=LAST_EVENTS), repr=False)

    @property
    def last_step(self) -> int:
        """The last that any row or event tells of."""
        ends = [int(series.steps[-1]) for series in self.series.values() if len(series)]
        return max([0, *ends, *(int(event["step"]) for event in self.events if event["step"] is not None)])

    @property
    def total_steps(self) -> int | None:
        """Optimizer steps that the run is to have; None where nobody says."""
        steps = self.facts.get("steps") or self.config.get("max_steps")
        return steps if isinstance(steps, int) and not isinstance(steps, bool) else None

    def fact(self, *names: str) -> Any:
        """A value within the facts of the start; None where it is missing."""
        found: Any = self.facts
        for name in names:
            found = found.get(name) if isinstance(found, dict) else None
        return found

    def take_event(self, row: dict[str, Any]) -> None:
        """One more event, from events.jsonl or between the rows of metrics."""
        kind, step = str(row["event"])[:40], number(row.get("step"))
        if kind in ("start", "resume", "end") and isinstance(row.get("facts"), dict):
            self.facts = row["facts"]
        self.event_counts[kind] += 1
        self.end = row if kind == "end" else None if kind in ("start", "resume") else self.end
        text = str(row.get("text", ""))
        event = {"event": kind, "step": step, "text": text, "time": str(row.get("time", ""))[:40]}
        if kind in ("resume", "skip") and step is not None and len(self.marks) < MARKS:
            self.marks.append((step, kind))
        if text or kind in ("start", "resume", "end"):
            (self.events if len(self.events) < FIRST_EVENTS else self._late).append(event)

    def take_row(self, row: dict[str, Any]) -> None:
        """One row of metrics: every number in it but the step."""
        step = number(row.get("step"))
        if isinstance(seconds := row.get("start"), dict):
            self.start = {str(name): found for name, text in seconds.items() if (found := number(text)) is not None}
        if "event" in row:
            self.take_event(row)
            return
        if step is None:
            return
        self.rows += 1
        for name, value in row.items():
            if name == "step" or isinstance(value, str | bool | list | dict):
                continue
            series = self.series.get(name)
            if series is None:
                if len(self.series) >= SERIES:
                    continue
                series = self.series[name] = Series()
            found = number(value)
            if found is None:
                series.lost += 1
            else:
                series.steps.append(step)
                series.values.append(found)


def number(value: Any) -> float | None:
    """A finite number that JSON gave; None for anything else."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return None
    try:
        return float(value) if math.isfinite(value) else None
    except OverflowError:  # an integer of a thousand digits
        return None


def read_run(folder: Path, rows: bool = True) -> RunRecord:
    """Read a run folder, `rows` of metrics too. Raises FileNotFoundError, with one line, for what is none."""
    if not folder.is_dir():
        raise FileNotFoundError(f"no run folder at {shown(folder)}")
    if not any((folder / name).is_file() for name in FILES):
        runs = sorted(path.parent.name for path in folder.glob("*/metrics.jsonl"))[:3]
        hint = f"; runs in it: {', '.join(map(shown, runs))}" if runs else ""
        raise FileNotFoundError(
            f"{shown(folder)} is no run folder: it has none of {', '.join(FILES)}; give what --output_path named{hint}"
        )
    run = RunRecord(folder, folder.resolve().name)
    run.config = read_options(folder / "config.yaml", run.remarks)
    run.versions = read_object(folder / "versions.json", run.remarks)
    for name, take in (("metrics.jsonl", run.take_row), ("events.jsonl", run.take_event)):
        if rows or name == "events.jsonl":
            read_rows(folder / name, take, run.remarks)
    run.events += run._late
    missing = sum(run.event_counts.values()) - len(run.events)
    if missing > 0:
        run.remarks.append(f"{missing:,} of {sum(run.event_counts.values()):,} events are left out, from the middle")
    in_order(run.series)
    return run


def read_rows(path: Path, take: Callable[[dict[str, Any]], None], remarks: list[str]) -> None:
    """Give every JSON object in a file of lines to `take`; what is no object is counted and told."""
    if not path.is_file():
        remarks.append(f"{path.name} is missing")
        return
    damaged, cut = 0, False
    try:
        for line in lines_of(path):
            cut = False
            try:
                row = json.loads(line)
                if not isinstance(row, dict):
                    raise ValueError
                if path.name != "events.jsonl" or "event" in row:
                    take(row)
            except (ValueError, RecursionError):
                damaged, cut = damaged + bool(line.strip()), bool(line.strip()) and not line.endswith(b"\n")
    except OSError as error:
        remarks.append(f"{path.name} can't be read to its end: {error.strerror}")
    if cut:
        damaged -= 1
        remarks.append(f"the last line of {path.name} is cut off")
    if damaged:
        remarks.append(f"{damaged:,} lines of {path.name} are damaged and left out")


def lines_of(path: Path) -> Iterator[bytes]:
    """Lines with their ends; one that is longer than LONGEST_ROW comes in pieces, none of which is JSON."""
    with open(path, "rb") as file:
        while line := file.readline(LONGEST_ROW):
            yield line


def in_order(series: dict[str, Series]) -> None:
    """Rows of an older program may go back; sort them by step, where need be."""
    for each in series.values():
        if any(later < earlier for earlier, later in zip(each.steps, each.steps[1:], strict=False)):
            order = sorted(range(len(each)), key=each.steps.__getitem__)
            each.steps, each.values = (array("d", (old[i] for i in order)) for old in (each.steps, each.values))


def read_object(path: Path, remarks: list[str]) -> dict[str, Any]:
    """A file that holds one JSON object; {} and a remark where it doesn't."""
    try:
        found = json.loads(path.read_bytes())
    except (OSError, ValueError, RecursionError) as error:
        remarks.append(f"{path.name} {'is missing' if isinstance(error, FileNotFoundError) else 'is damaged'}")
        return {}
    return found if isinstance(found, dict) else {}


def read_options(path: Path, remarks: list[str]) -> dict[str, Any]:
    """config.yaml as it was written; {} and a remark where it can't be read."""
    import yaml

    try:
        text = path.read_bytes()
        if any(isinstance(event, yaml.AliasEvent) for event in yaml.parse(text)):  # ours has none; they can be endless
            raise ValueError("aliases")
        found = yaml.safe_load(text)
    except (OSError, ValueError, RecursionError, yaml.YAMLError) as error:
        remarks.append(f"{path.name} {'is missing' if isinstance(error, FileNotFoundError) else 'is damaged'}")
        return {}
    return {str(name): value for name, value in found.items()} if isinstance(found, dict) else {}
