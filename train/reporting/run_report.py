"""The report of one or several runs as one HTML file that needs nothing else (`train/report.py`, and the end of a run).

    write_report(Path("report.html"), [read_run(Path("runs/cats"))])

All that grows with a run is bounded: points of curves, columns of heat maps, pictures, events. What is left out is told.
"""

import json
import os
from collections import Counter
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from files.atomic_files import write_file
from files.shown import one_line, shown
from train.reporting.curves import charts, heat_maps
from train.reporting.data_summary import data_summary
from train.reporting.report_page import page
from train.reporting.run_record import RunRecord, read_run
from train.reporting.sample_pictures import PICTURES, timeline
from train.reporting.story import GIB, chosen_options, differences, duration, memory, paragraph, tiles, verdict

REPORT = "report.html"  # in a run folder
AT_THE_END = 48  # pictures: a second or two of the last one's time
LONGEST_TEXT = 1000  # characters of an event or option


def write_report(path: Path, runs: list[RunRecord], pictures: int = PICTURES) -> None:
    """Write the report of `runs` to `path`. Raises OSError where it can't be written."""
    write_file(path.absolute(), page(**content(runs, path.absolute().parent, pictures)))


def report_at_the_end(folder: Path) -> str:
    """Write RUN/report.html of a run that ends; the line to say. A report that fails is told, and ends nothing."""
    try:
        write_report(folder / REPORT, [read_run(folder)], AT_THE_END)
    except Exception as error:  # whatever it is: the run is done, and its files are there
        return f"warning: no report ({type(error).__name__}: {one_line(error)}); python train/report.py {folder} tries again"
    return f"report: {shown(folder / REPORT)}"


def content(runs: list[RunRecord], page_folder: Path, pictures: int) -> dict[str, Any]:
    """What the page is made of, plain values; `data` is for its script."""
    name_apart(runs)
    found_charts, note = charts(runs)
    samples = [timeline(run, max(2, pictures // len(runs))) if pictures else None for run in runs]
    data: dict[str, Any] = {
        "runs": [{"name": run.name, "steps": run.last_step, "marks": run.marks} for run in runs],
        "charts": found_charts,
        "heat_maps": heat_maps(runs),
        "samples": [{"run": number} | each for number, each in enumerate(samples) if each is not None],
    }
    return {
        "title": runs[0].name if len(runs) == 1 else f"{len(runs)} runs",
        "written": datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"),
        "runs": [of_run(run, page_folder) for run in runs],
        "places": {chart["place"] for chart in found_charts},
        "charts_note": note,
        "has_heat_maps": bool(data["heat_maps"]),
        "samples": data["samples"],
        "differences": [(name, [text[:LONGEST_TEXT] for text in row]) for name, row in differences(runs)],
        "data": data,
    }


def name_apart(runs: list[RunRecord]) -> None:
    """Give runs of one name their parents' names as well."""
    counts = Counter(run.name for run in runs)
    for number, run in enumerate(runs):
        if counts[run.name] > 1:
            run.name = f"{run.folder.resolve().parent.name}/{run.name} ({number + 1})"


def of_run(run: RunRecord, page_folder: Path) -> dict[str, Any]:
    """One run's sections of the page."""
    ended = verdict(run)
    lost = sum(series.lost for name, series in run.series.items() if name == "loss")
    notes = [*run.remarks, *([f"{lost:,} rows have a loss that is not finite"] if lost else [])]
    return {
        "name": run.name,
        "folder": os.path.relpath(run.folder, page_folder),
        "verdict": ended.text,
        "mood": ended.mood,
        "paragraph": paragraph(run),
        "tiles": tiles(run),
        "notes": notes,
        "memory": memory_bars(run),
        "start": start_bars(run.start),
        "events": [event | {"text": shown(event["text"], LONGEST_TEXT)} for event in run.events],
        "event_counts": sorted(run.event_counts.items()),
        "data": data_summary(run, page_folder),
        "groups": groups(run),
        "chosen": [(name, text[:LONGEST_TEXT]) for name, text in chosen_options(run)],
        "options": [(name, plain(value)) for name, value in run.config.items()],
        "versions": [(name, plain(value)) for name, value in run.versions.items()],
    }


def plain(value: Any) -> str:
    text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False, default=str)
    return text[:LONGEST_TEXT]


def groups(run: RunRecord) -> list[tuple[str, str]]:
    """Trainable parameters by target group."""
    found = run.fact("lora", "groups")
    if not isinstance(found, dict):
        return []
    return [
        (str(name), f"{entry.get('layers', 0):,} layers, {entry.get('parameters', 0):,} parameters")
        for name, entry in found.items()
        if isinstance(entry, dict)
    ]


def memory_bars(run: RunRecord) -> dict[str, Any] | None:
    """The plan's parts in GiB, on the device and in the host's memory, with the peak that was measured."""
    plan = run.fact("memory")
    if not isinstance(plan, dict):
        return None
    parts = [
        (f"{name}{', on the host' if place == 'host' else ''}", size)
        for place in ("device", "host")
        for name, size in (plan.get(place) or {}).items()
        if isinstance(size, int) and size > 0
    ]
    most = max((size for _, size in parts), default=0)
    total, peak = run.fact("hardware", "device_bytes"), run.end.get("peak_bytes") if run.end else None
    planned = sum(size for name, size in parts if not name.endswith(", on the host"))
    notes = [f"planned {memory(planned)}" + (f" of the card's {total / GIB:.0f}" if total else "")]
    if isinstance(peak, int) and peak:
        whose = "the allocator's peak" if total else "the process's peak, libraries included,"
        notes.append(f"{whose} was {memory(peak)}")
    bars = [(name, memory(size), f"{100 * size / most:.1f}") for name, size in parts]
    return {"bars": bars, "note": "; ".join(notes)}


def start_bars(seconds: dict[str, float]) -> dict[str, Any] | None:
    """What came before the first step, one after the other: (name, text, where it begins and how long it is, in percent)."""
    parts = [(name, took) for name, took in seconds.items() if took > 0]
    whole = sum(took for _, took in parts)
    if not parts:
        return None
    bars, begin = [], 0.0
    for name, took in parts:
        bars.append((name.replace("_", " "), duration(took), f"{100 * begin / whole:.2f}", f"{100 * took / whole:.2f}"))
        begin += took
    return {"bars": bars, "note": f"{duration(whole)} in all"}
