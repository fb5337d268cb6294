"""The curves of runs for the page: which numbers share a chart, and long series in buckets; heat maps over σ."""

import re
from collections.abc import Iterable
from typing import Any

import numpy as np

from train.reporting.run_record import RunRecord, Series

POINTS = 60_000  # on the page, over all series together
MOST_POINTS, FEWEST_POINTS = 1000, 60  # of one series
FEW = 40  # points or fewer are drawn as dots, and not smoothed
COLUMNS, FEWEST_COLUMNS = 80, 10  # of a heat map
MOST_EMPTY = 0.1  # of its cells; else columns are merged
CHARTS = 40
SIGMA = re.compile(r"(.+)/sigma_([0-9.]+)")
TITLES = {
    "loss": "Loss",
    "lr": "Learning rate",
    "grad_norm": "Gradient norm",
    "validation_gap": "Gap between held-out and training samples",
    "seconds_per_step": "Seconds a step",
    "samples_per_second": "Samples a second",
    "tokens_per_second": "Tokens a second",
    "tflops_per_gpu": "Arithmetic, TFLOP/s on each GPU",
    "mfu": "Share of the GPU's peak",
    "seconds": "Where a step's seconds go",
    "sigma": "σ as drawn",
    "skipped": "Skipped steps and samples",
}
FIRST = ("loss", "validation_gap", "grad_norm", "lr", "seconds_per_step", "samples_per_second")
SPEED = re.compile(r"second|_per_|peak|flops|mfu|memory|bytes|gib|utili|time", re.IGNORECASE)
TOGETHER = ("sigma", "skipped")  # numbers that begin so share a chart


def charts(runs: list[RunRecord]) -> tuple[list[dict[str, Any]], str]:
    """Charts for the page, the most looked at first, and a sentence on what is in buckets ("" where nothing is).

    All losses share a chart, the parts `name/part` of a number share one; `epoch` and what stands by σ have none.
    """
    found: dict[str, list[tuple[int, str, Series]]] = {}
    for number, run in enumerate(runs):
        for name, series in run.series.items():
            if len(series) and name != "epoch" and not SIGMA.fullmatch(name):
                found.setdefault(chart_of(name), []).append((number, name, series))
    names = sorted(found, key=lambda name: (FIRST.index(name) if name in FIRST else len(FIRST), name))[:CHARTS]
    count = sum(len(found[name]) for name in names)
    most = int(np.clip(POINTS // max(1, count), FEWEST_POINTS, MOST_POINTS))
    longest = max((len(series) for name in names for _, _, series in found[name]), default=0)
    made = [
        {
            "title": TITLES.get(name, name.replace("_", " ").replace("/", ": ")),
            "place": "speed" if SPEED.search(name) else "curves" if name in FIRST else "more",
            "series": [
                {"run": run, "name": label} | points(series, most)
                for run, label, series in sorted(found[name], key=lambda each: (each[1] != name, each[1], each[0]))
            ],
        }
        for name in names
    ]
    note = ""
    if longest > most:
        note = (
            f"Series of more than {most:,} rows (the longest has {longest:,}) are drawn in {most:,} buckets: a line through "
            "their means in a band from the least to the largest value."
        )
    if len(found) > CHARTS:
        note += f" {len(found) - CHARTS} more numbers of metrics.jsonl are not drawn."
    return made, note.strip()


def chart_of(name: str) -> str:
    """The chart that a number belongs to, by its name."""
    whole, _, part = name.partition("/")
    if whole.endswith("loss") and not part:
        return "loss"
    if whole.endswith("validation_gap"):
        return "validation_gap"
    return next((name for name in TOGETHER if whole.startswith(f"{name}_")), whole)


def points(series: Series, most: int) -> dict[str, Any]:
    """`x` and `y`, and `lo` and `hi` where buckets of rows stand for more than `most` points."""
    x, y = np.frombuffer(series.steps), np.frombuffer(series.values)
    if len(x) <= most:
        return {"x": rounded(x), "y": rounded(y), "dots": len(x) <= FEW}
    first = np.linspace(0, len(x), most, endpoint=False).astype(int)
    sizes = np.diff([*first, len(x)])
    with np.errstate(over="ignore"):
        mean = np.add.reduceat(y / sizes.repeat(sizes), first)
    return {
        "x": rounded(np.add.reduceat(x, first) / sizes),
        "y": rounded(mean),
        "lo": rounded(np.minimum.reduceat(y, first)),
        "hi": rounded(np.maximum.reduceat(y, first)),
        "dots": False,
    }


def rounded(values: Iterable[float]) -> list[float]:
    """Six digits: what a screen can show."""
    return [float(f"{value:.6g}") for value in values]


def heat_maps(runs: list[RunRecord]) -> list[dict[str, Any]]:
    """Numbers that stand by σ (`validation_loss/sigma_0.1`) over the steps: rows of cells from the largest σ down."""
    maps = []
    for place, run in enumerate(runs):
        families: dict[str, dict[float, Series]] = {}
        for name, series in run.series.items():
            if (match := SIGMA.fullmatch(name)) and len(series) and match[2].count(".") < 2 and match[2] != ".":
                families.setdefault(match[1], {})[float(match[2])] = series
        for family, by_sigma in sorted(families.items(), key=lambda each: (each[0] == "loss", each[0])):
            if len(by_sigma) > 1:
                maps.append({"run": place, "name": family} | cells(by_sigma))
    return maps


def cells(by_sigma: dict[float, Series]) -> dict[str, Any]:
    """`steps` of the columns, `sigmas` of the rows, and their `values`.

    Columns hold means of several steps where there are too many, or where most steps have drawn few of the σ.
    """
    steps = sorted({step for series in by_sigma.values() for step in series.steps})
    sigmas = sorted(by_sigma, reverse=True)[:64]
    columns = min(COLUMNS, len(steps))
    while True:
        groups = [list(map(float, group)) for group in np.array_split(steps, columns)]
        column_of = {step: column for column, group in enumerate(groups) for step in group}
        values = [column_means(by_sigma[sigma], column_of, columns) for sigma in sigmas]
        empty = sum(value is None for row in values for value in row) / (len(sigmas) * columns)
        if empty <= MOST_EMPTY or columns <= FEWEST_COLUMNS:
            return {
                "steps": [group[-1] for group in groups],
                "sigmas": sigmas,
                "values": values,
                "all_steps": len(steps),
            }
        columns = max(FEWEST_COLUMNS, columns // 2)


def column_means(series: Series, column_of: dict[float, int], columns: int) -> list[float | None]:
    """The mean in each column, None in one without a value."""
    found: list[list[float]] = [[] for _ in range(columns)]
    for step, value in zip(series.steps, series.values, strict=True):
        found[column_of[step]].append(value)
    return [float(f"{np.mean(values):.6g}") if values else None for values in found]
