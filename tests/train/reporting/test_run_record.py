"""Reading a run folder: whole, broken, partial and running ones; only what is no run is an error."""

import json
from pathlib import Path

import pytest

from tests.helpers.run_folders import FACTS, write_run
from train.reporting import run_record
from train.reporting.run_record import read_run


def test_a_whole_run(tmp_path: Path) -> None:
    run = read_run(write_run(tmp_path / "cats"))
    assert (run.name, run.last_step, run.total_steps) == ("cats", 100, 100) and run.remarks == []
    loss = run.series["loss"]
    assert len(loss) == 100 and list(loss.steps) == list(range(1, 101)) and loss.values[0] > loss.values[-1]
    assert len(run.series["validation_loss/sigma_0.5"]) == 11
    assert run.start == {"imports": 4.0, "first step": 12.0} and "start" not in run.series
    assert run.facts == FACTS and run.fact("lora", "trainable") == 4096 and run.fact("lora", "no", "such") is None
    assert run.end is not None and run.end["exit_code"] == 0
    assert run.event_counts == {"start": 1, "skip": 1, "warning": 1, "note": 1, "end": 1}
    assert run.marks == [(50.0, "skip")]


def test_a_run_that_was_cut_off_mid_line_and_lost_files(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "run")
    for name in ("config.yaml", "versions.json", "events.jsonl"):
        (folder / name).unlink()
    lines = (folder / "metrics.jsonl").read_bytes().splitlines(keepends=True)[:40]
    lines[10] = b"\xff\xfe not json\n"
    lines[11] = b"[1, 2]\n"
    (folder / "metrics.jsonl").write_bytes(b"".join(lines) + b'{"step": 41, "lo')
    run = read_run(folder)
    assert run.last_step > 30 and run.config == {} and run.end is None and run.total_steps is None
    assert run.remarks == [
        "config.yaml is missing",
        "versions.json is missing",
        "the last line of metrics.jsonl is cut off",
        "2 lines of metrics.jsonl are damaged and left out",
        "events.jsonl is missing",
    ]


@pytest.mark.parametrize(
    ("row", "names"),
    [
        ('{"step": 1, "loss": null, "a": 1}', {"loss", "a"}),
        ('{"step": "1", "loss": 2}', set()),
        ('{"step": true, "loss": 2}', set()),
        ('{"loss": 2}', set()),
        ('{"step": 1, "loss": NaN, "text": "x", "yes": true, "list": [1], "nested": {"a": 1}}', {"loss"}),
        ('{"step": 1, "big": 1' + "0" * 400 + "}", {"big"}),
        ("[" * 100_000, set()),
        ("null", set()),
    ],
)
def test_odd_rows(tmp_path: Path, row: str, names: set[str]) -> None:
    (tmp_path / "metrics.jsonl").write_text(row + "\n")
    run = read_run(tmp_path)
    assert set(run.series) == names
    assert all(series.lost + len(series) == 1 for series in run.series.values())
    assert run.series["loss"].lost == 1 if "loss" in names else True


@pytest.mark.parametrize("name", ["config.yaml", "versions.json", "events.jsonl", "metrics.jsonl"])
@pytest.mark.parametrize(
    "content", [b"", b"\x00\xff\xfe", b"- 1\n- [", b"[1]", b"1", b"{}", b'{"event": "end"}\n', b"a: &a [*a]"]
)
def test_any_damage_is_a_remark_at_most(tmp_path: Path, name: str, content: bytes) -> None:
    from train.reporting.run_report import write_report

    folder = write_run(tmp_path / "run", steps=10, samples=0)
    (folder / name).write_bytes(content)
    write_report(tmp_path / "page.html", [read_run(folder)])
    assert (tmp_path / "page.html").stat().st_size > 10_000


def test_what_is_no_run_is_one_clear_error(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="no run folder at"):
        read_run(tmp_path / "gone")
    write_run(tmp_path / "cats", steps=3, samples=0)
    with pytest.raises(FileNotFoundError, match=r"is no run folder: it has none of config.yaml, .*runs in it: cats"):
        read_run(tmp_path)
    (tmp_path / "file").touch()
    with pytest.raises(FileNotFoundError, match="no run folder at"):
        read_run(tmp_path / "file")


def test_rows_that_go_back_are_put_in_order(tmp_path: Path) -> None:
    rows = [{"step": step, "loss": float(step)} for step in (3, 1, 2)]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    series = read_run(tmp_path).series["loss"]
    assert list(series.steps) == list(series.values) == [1, 2, 3]


def test_many_events_and_names_are_bounded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    events = [{"step": step, "event": "skip", "text": f"{step}"} for step in range(2000)]
    (tmp_path / "events.jsonl").write_text("".join(json.dumps(event) + "\n" for event in events))
    names = {f"name{number}": 1 for number in range(1000)}
    (tmp_path / "metrics.jsonl").write_text(json.dumps({"step": 1} | names) + "\n" + "x" * 3_000_000 + "\n")
    run = read_run(tmp_path)
    assert len(run.series) == run_record.SERIES and len(run.events) == 500 and run.event_counts["skip"] == 2000
    assert [run.events[0]["text"], run.events[99]["text"], run.events[100]["text"]] == ["0", "99", "1600"]
    assert "1,500 of 2,000 events are left out, from the middle" in run.remarks
    assert len(run.marks) == run_record.MARKS


def test_events_may_stand_between_the_rows(tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").write_text(
        '{"event": "skip", "step": 3, "text": "left out"}\n{"step": 4, "loss": 1}\n'
    )
    run = read_run(tmp_path)
    assert run.event_counts == {"skip": 1} and len(run.series) == 1
