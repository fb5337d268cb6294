"""Curves: which numbers share a chart, buckets that lose no extreme, heat maps over σ."""

import json
from pathlib import Path

import numpy as np
import pytest

from tests.helpers.run_folders import write_run
from train.reporting import curves
from train.reporting.curves import charts, heat_maps, points
from train.reporting.run_record import RunRecord, Series, read_run


def series_of(values: np.ndarray) -> Series:
    series = Series()
    series.steps.extend(range(1, len(values) + 1))
    series.values.extend(values)
    return series


@pytest.mark.parametrize("count", [1001, 5000, 99_999, 100_000])
def test_buckets_keep_mean_and_extremes(count: int) -> None:
    values = np.random.default_rng(0).normal(size=count)
    values[count // 2] = 1000.0
    found = points(series_of(values), 1000)
    assert len(found["x"]) == len(found["y"]) == len(found["lo"]) == len(found["hi"]) == 1000 and not found["dots"]
    assert max(found["hi"]) == 1000.0 and min(found["lo"]) == pytest.approx(values.min(), rel=1e-5)
    assert all(low <= mean <= high for low, mean, high in zip(found["lo"], found["y"], found["hi"], strict=True))
    sizes = np.diff(np.linspace(0, count, 1001).astype(int))
    assert np.average(found["y"], weights=sizes) == pytest.approx(values.mean(), rel=1e-4)
    assert found["x"] == sorted(found["x"]) and found["x"][0] < 110 and found["x"][-1] > count - 110


def test_short_series_stay_as_they_are_and_large_numbers_do_not_overflow() -> None:
    found = points(series_of(np.array([1.0, 3.0])), 1000)
    assert found == {"x": [1, 2], "y": [1, 3], "dots": True}
    assert points(series_of(np.full(5000, 1.5e308)), 100)["y"] == pytest.approx([1.5e308] * 100)


def test_losses_share_a_chart_and_parts_of_a_number_share_one(tmp_path: Path) -> None:
    rows = [
        {"step": 1, "loss": 1, "validation_loss": 2, "ema_validation_loss": 2, "training_subset_loss": 1, "lr": 1e-4}
    ]
    rows += [{"step": 2, "weight_norm/attention": 1, "weight_norm/mlp": 2, "validation_loss/sigma_0.1": 1, "epoch": 1}]
    rows += [{"step": 3, "sigma_mean": 0.5, "sigma_max": 1, "seconds/forward": 0.1, "mfu": 0.4}]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    found, note = charts([read_run(tmp_path)])
    names = {chart["title"]: [series["name"] for series in chart["series"]] for chart in found}
    assert names == {
        "Loss": ["loss", "ema_validation_loss", "training_subset_loss", "validation_loss"],
        "Learning rate": ["lr"],
        "Share of the GPU's peak": ["mfu"],
        "Where a step's seconds go": ["seconds/forward"],
        "σ as drawn": ["sigma_max", "sigma_mean"],
        "weight norm": ["weight_norm/attention", "weight_norm/mlp"],
    }
    places = [chart["place"] for chart in found]
    assert places == ["curves", "curves", "speed", "speed", "more", "more"] and note == ""


def test_all_that_is_drawn_is_bounded_and_told(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    runs = []
    for number in range(3):
        run = RunRecord(tmp_path, f"{number}")
        run.series = {f"name{name}": series_of(np.arange(5000.0)) for name in range(60)}
        runs.append(run)
    found, note = charts(runs)
    assert len(found) == curves.CHARTS
    assert sum(len(series["x"]) for chart in found for series in chart["series"]) <= curves.POINTS
    assert "the longest has 5,000" in note and "20 more numbers" in note


def test_heat_map_by_sigma_over_time(tmp_path: Path) -> None:
    [found] = heat_maps([read_run(write_run(tmp_path / "run", samples=0))])
    assert found["name"] == "validation_loss" and found["sigmas"] == [0.9, 0.5, 0.1]
    assert found["steps"] == [float(step) for step in range(0, 101, 10)]
    assert found["values"][0][0] == pytest.approx(0.9 + 0.36) and found["values"][2][6] == pytest.approx(0.1)


def test_a_long_heat_map_has_means_in_columns(tmp_path: Path) -> None:
    rows = [{"step": step, "loss/sigma_0.1": step, "loss/sigma_0.9": 1, "other/sigma_0.5": 1} for step in range(1, 801)]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    [found] = heat_maps([read_run(tmp_path)])  # a single σ makes no map
    assert len(found["steps"]) == curves.COLUMNS and found["all_steps"] == 800
    assert found["values"][1][0] == pytest.approx(5.5) and found["steps"][0] == 10


def test_columns_are_merged_where_few_sigmas_were_drawn(tmp_path: Path) -> None:
    rows = [{"step": step, f"loss/sigma_0.{1 + 2 * (step % 4)}": step} for step in range(1, 81)]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    [found] = heat_maps([read_run(tmp_path)])
    assert len(found["steps"]) == 20 and found["all_steps"] == 80
    assert not any(value is None for row in found["values"] for value in row)
