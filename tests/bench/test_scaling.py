"""The benchmark of scaling: which runs it makes, and what it makes of their numbers. The runs themselves are stood in for."""

import json
from pathlib import Path

import pytest

from bench import scaling
from bench.measured_training import of_rank_0
from bench.run_watch import covered


def result(seconds: float, **more) -> dict:
    step = {"tokens": 1, "compile_seconds": 0.0, "captures": 0, "profiled": False}
    return {"code": 0, "rank": 0, "steps": [step | {"seconds": seconds}] * 12, "host_gib": 2.0, **more}


@pytest.fixture
def launched(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> list[tuple[list[str], int]]:
    """What was launched: flags and ranks. A step takes 0.5 s on one rank, 0.55 s on more; three ranks fail."""
    seen: list[tuple[list[str], int]] = []

    def measure(runs, *, profiled, launcher, gpus):
        ((flags),) = runs
        seen.append((flags, gpus))
        assert launcher == "deepspeed" and profiled == (0 if "--learning_rate" in flags else scaling.PROFILED)
        output = Path(flags[flags.index("--output_path") + 1])
        output.mkdir()
        rows = [{"start": {"imports": 1.0, "loading": 2.5}}, {"loss": 0.25}, {"loss": 0.2 if gpus == 1 else 0.2002}]
        (output / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        profile = {"wall": 2.0, "collectives": 0.5}
        return [None if gpus == 3 else result(0.5 if gpus == 1 else 0.55, profile=profile, gpu_gib=30.0)]

    monkeypatch.setattr(scaling, "measure_runs", measure)
    monkeypatch.setattr(scaling, "prepare", lambda folder, tiny: None)
    monkeypatch.setattr(scaling, "mixed_data", lambda folder, tiny: folder / "mixed")
    return seen


def test_efficiency_is_against_one_rank_and_curves_keep_the_global_batch(launched, tmp_path, capsys):
    out = tmp_path / "numbers.json"
    flags = [
        "--folder",
        str(tmp_path),
        "--tiny",
        "--ranks",
        "4,1,2",
        "--cases",
        "zero2,zero3,curves",
        "--out",
        str(out),
    ]
    assert scaling.main(flags) == 0
    assert [gpus for _, gpus in launched] == [1, 2, 4] * 3
    accumulated = [words[words.index("--gradient_accumulation_steps") + 1] for words, _ in launched[6:]]
    assert accumulated == ["4", "2", "1"]
    printed = capsys.readouterr().out
    assert "| zero2 | 4 | 0.5500 | 7.27 | 90.9% | 25.0% | 30.00 | 2.0 | 3.5 |" in printed
    assert "| zero2 | 1 | 0.5000 | 2.00 | 100.0% |" in printed
    assert "2 losses of one global batch on 1 and 4 ranks: at most 1.0e-03 apart" in printed
    assert len(json.loads(out.read_text())["rows"]) == 9


def test_a_run_that_failed_is_told_and_the_others_go_on(launched, tmp_path, capsys):
    assert scaling.main(["--folder", str(tmp_path), "--tiny", "--ranks", "2,3", "--cases", "zero2,curves"]) == 1
    printed = capsys.readouterr().out
    assert "| zero2 | 3 | the run failed" in printed and "3 micro-batches don't divide by 2 ranks" in printed
    assert "| zero2 | 2 | 0.5500 | 3.64 | – |" in printed  # no run of one rank to compare with


@pytest.mark.parametrize("ranks", ["0", "a", "1,,2"])
def test_what_cannot_be_run_is_refused(launched, tmp_path, ranks):
    with pytest.raises(SystemExit):
        scaling.main(["--folder", str(tmp_path), "--tiny", "--ranks", ranks])
    assert not launched


def test_host_memory_is_that_of_all_ranks():
    rows = [{"rank": rank, "host_gib": 1.0 + rank} for rank in (1, 0, 1, 0)]
    assert [row["host_gib"] for row in of_rank_0(rows)] == [3.0, 3.0]


def test_the_time_in_collectives_counts_overlaps_once():
    assert covered([(0.0, 2.0), (1.0, 3.0), (5.0, 9.0)], 1.0, 6.0) == 3.0
