"""The benchmark of the start reads the run's own row, and says so when a run failed."""

import json
import subprocess
from pathlib import Path

import pytest

from bench import start_up

START = {"python": 0.5, "imports": 1.25, "loading": 2.0, "first step": 0.25}


@pytest.fixture
def commands(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> list[list[str]]:
    """The model is there already; the command writes what a run would."""
    (tmp_path / "model").mkdir()
    (tmp_path / "data").mkdir()
    ran: list[list[str]] = []

    def run(words: list[str], env: dict[str, str], stdout, stderr) -> subprocess.CompletedProcess[str]:
        ran.append(words)
        stdout.write("recomputing 0 of 60 blocks\nnothing of interest\nerror: no room\n")
        if len(ran) == 2:
            return subprocess.CompletedProcess(words, 4)
        folder = Path(words[words.index("--output_path") + 1])
        folder.mkdir()
        rows = [{"step": 1, "start": START, "compiler": {"fxgraph_cache_hit": 6}}, {"step": 5, "seconds_per_step": 0.3}]
        (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        return subprocess.CompletedProcess(words, 0)

    monkeypatch.setattr(start_up.subprocess, "run", run)
    return ran


def test_pieces_and_their_sum_are_shown(commands, tmp_path, capsys):
    out = tmp_path / "numbers.json"
    flags = ["--folder", str(tmp_path), "--runs", "cold", "--launcher", "python", "--flags", "--base_precision float8"]
    assert start_up.main([*flags, "--out", str(out)]) == 0
    (row,) = json.loads(out.read_text())["rows"]
    assert row["start"] == START and row["first_step"] == 4.0 and row["step"] == 0.3
    assert row["said"] == ["recomputing 0 of 60 blocks"]
    assert commands[0][-2:] == ["--base_precision", "float8"] and "deepspeed" not in commands[0][:2]
    assert "first step at" in capsys.readouterr().out


def test_a_run_that_failed_is_told_and_the_others_are_shown(commands, tmp_path, capsys):
    assert start_up.main(["--folder", str(tmp_path), "--runs", "warm,warm,warm"]) == 1
    said = capsys.readouterr().out
    assert "exit code 4" in said and "error: no room" in said and said.count('"first_step"') == 2
