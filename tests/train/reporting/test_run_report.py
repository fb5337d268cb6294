"""The whole page: everything in one file, hostile names harmless, bounded for the longest runs, and never a run's end."""

import html
import json
import re
from pathlib import Path
from typing import Any

import pytest

from tests.helpers.run_folders import HOSTILE, write_run, write_samples
from train import report
from train.reporting import run_report
from train.reporting.report_page import embedded
from train.reporting.run_record import read_run
from train.reporting.run_report import report_at_the_end, write_report


def data_of(page: str) -> dict[str, Any]:
    """What the page's script gets."""
    found = re.search(r'<script type="application/json" id="data">(.*?)</script>', page, re.DOTALL)
    assert found
    return json.loads(found[1])


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("runs") / "cats & <dogs>"
    write_run(folder, sample_prompts=(HOSTILE,), wandb_run_name=HOSTILE)
    assert report.main([str(folder)]) == 0
    return (folder / "report.html").read_text(encoding="utf-8")


def test_the_page_holds_everything_itself(page: str) -> None:
    assert not re.search(
        r"""(src|href)=["'](?!data:|#main)|url\(#?["']?http|@import""", re.sub(r'<a href="\./', "", page)
    )
    assert page.count("data:image/jpeg;base64,") == 10 and "http://www.w3.org/2000/svg" in page
    assert not re.search(r"https?://(?!www\.w3\.org/2000/svg)", page)
    for heading in ("Curves", "Loss by noise level", "Sample images", "Speed and memory", "Start-up", "Events", "Data"):
        assert f"<h2>{heading}" in page or f"<h3>{heading}" in page, heading


def test_hostile_names_and_prompts_are_text(page: str) -> None:
    assert page.count("<script") == 3 and page.count("</script") == 3 and "alert(1)</script>" not in page
    assert "<b>" not in page.split("</style>")[1].replace("<b>", "", page.count('<div class="tile"><b>'))
    assert "<title>cats &amp; &lt;dogs&gt;</title>" in page
    assert data_of(page)["samples"][0]["prompts"][1]["text"] == HOSTILE
    assert "\u2028" not in page.partition('id="data">')[2].partition("</script>")[0]
    assert "\u202e" not in html.unescape(page).partition("<h2>Events</h2>")[2].partition("<h2>Data")[0]


def test_json_in_a_script_element() -> None:
    text = embedded({"a": "</script><!--\u2028\ud800&", "b": [1.5, None]})
    assert not set("<>&\u2028") & set(text) and text.isascii()
    assert json.loads(text)["a"] == "</script><!--\u2028\ud800&"
    with pytest.raises(ValueError):
        embedded([float("nan")])


def test_a_run_of_a_hundred_thousand_rows_and_thousands_of_pictures_is_bounded(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "long", samples=0)
    with open(folder / "metrics.jsonl", "w") as file:
        for step in range(1, 100_001):
            file.write(
                f'{{"step": {step}, "loss": {1 / step}, "lr": 1e-4, "grad_norm": 0.5, "seconds_per_step": 0.3}}\n'
            )
    write_samples(folder, list(range(1200)), tuple(f"prompt {number}" for number in range(3)))
    write_report(tmp_path / "page.html", [read_run(folder)])
    text = (tmp_path / "page.html").read_text(encoding="utf-8")
    assert len(text) < 3_000_000
    assert "the longest has 100,000" in text and "of 1,199 steps, evenly spread" in text
    assert all(len(series["x"]) <= 1000 for chart in data_of(text)["charts"] for series in chart["series"])


def test_several_runs_side_by_side(tmp_path: Path) -> None:
    folders = [write_run(tmp_path / name / "run", lora_rank=rank) for name, rank in (("a", 8), ("b", 16))]
    output = tmp_path / "compared.html"
    assert report.main([*map(str, folders), "--output", str(output), "--pictures", "8"]) == 0
    text = output.read_text(encoding="utf-8")
    data = data_of(text)
    assert [run["name"] for run in data["runs"]] == ["a/run (1)", "b/run (2)"]
    assert re.search(r'<th scope="row">lora_rank</th><td><code>8</code></td><td><code>16</code></td>', text)
    assert [series["run"] for series in data["charts"][0]["series"]] == [0, 1, 0, 1]
    assert text.count("data:image/jpeg;base64,") <= 8 and "<title>2 runs</title>" in text


def test_the_command_on_what_is_no_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert report.main([str(tmp_path)]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and "is no run folder" in error and error.count("\n") == 1
    folder = write_run(tmp_path / "run", steps=3, samples=0)
    assert report.main([str(folder), "--output", str(tmp_path / "no" / "r.html")]) == 2
    assert report.main([str(folder), "--pictures", "-1"]) == 2
    assert capsys.readouterr().err.count("\n") == 2 and not (folder / "report.html").exists()


def test_what_is_missing_is_said_and_a_report_is_made_all_the_same(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "events.jsonl").write_text('{"event": "start", "step": 0, "text": "training begins"}\n{"event"')
    assert report.main([str(tmp_path), "--pictures", "0"]) == 0
    said = capsys.readouterr().out
    assert "metrics.jsonl is missing" in said and "the last line of events.jsonl is cut off" in said
    assert "No rows of numbers yet." in (tmp_path / "report.html").read_text(encoding="utf-8")


def test_a_report_that_fails_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = write_run(tmp_path / "run", steps=3, samples=1)
    assert report_at_the_end(folder) == f"report: {folder / 'report.html'}"
    monkeypatch.setattr(run_report, "page", lambda **_: 1 / 0)
    line = report_at_the_end(folder)
    assert line.startswith("warning: no report (ZeroDivisionError: division by zero); python train/report.py")
