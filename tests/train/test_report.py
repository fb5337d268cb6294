"""The report that a run writes at its end: of a whole run, of one that goes on; never a reason to fail."""

import json
import re
from pathlib import Path

import pytest

from tests.helpers.training_run import train
from train import report

MORE = ("--validation_samples", "2", "--validation_steps", "2", "--save_steps", "2")


def test_a_run_writes_its_report_and_goes_on(
    small_model: Path, small_data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "run"
    assert train(small_model, small_data, run, *MORE) == 0
    lines = capsys.readouterr().err.splitlines()
    assert f"report: {run / 'report.html'}" in lines and lines[-1].startswith("done: 4 steps")
    page = (run / "report.html").read_text(encoding="utf-8")
    assert "done: step 4 of 4" in page and "12 samples (in 2 sizes)" in page
    assert train(small_model, small_data, run, *MORE, "--max_steps", "6") == 0
    page = (run / "report.html").read_text(encoding="utf-8")
    assert "done: step 6 of 6" in page and "resumed from the checkpoint of step 4" in page
    found = re.search(r'id="data">(.*?)</script>', page, re.DOTALL)
    assert found
    charts = {chart["title"]: chart for chart in json.loads(found[1])["charts"]}
    assert {"Loss", "Learning rate", "Gradient norm", "Seconds a step"} <= charts.keys()
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert charts["Loss"]["series"][0]["y"] == pytest.approx([row["loss"] for row in rows if "loss" in row], rel=1e-5)
    assert "<h3>Start-up" in page  # where the time before the first step went


def test_off_and_a_report_that_fails(
    small_model: Path,
    small_data: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert train(small_model, small_data, tmp_path / "off", "--report", "off", "--max_steps", "1") == 0
    assert not (tmp_path / "off" / "report.html").exists()

    def broken(*_: object, **__: object) -> None:
        raise MemoryError("nothing left\nat all")

    monkeypatch.setattr("train.reporting.run_report.write_report", broken)
    capsys.readouterr()
    assert train(small_model, small_data, tmp_path / "run", "--max_steps", "1") == 0
    lines = [line for line in capsys.readouterr().err.splitlines() if "no report" in line]
    assert len(lines) == 1 and lines[0].startswith("warning: no report (MemoryError: nothing left\\nat all); python")
    assert (tmp_path / "run" / "lora.safetensors").is_file()
    monkeypatch.undo()
    assert report.main([str(tmp_path / "run")]) == 0
