"""The expected time of a run: from earlier runs of its like, scaled by tokens; from the measurements on an H100; or unknown."""

import copy
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from tests.helpers.full_size_setup import setup
from tests.helpers.run_folders import FACTS, write_run
from train.engine.optimizer import Optimizer
from train.reporting.expected_time import expected_time

RUN = setup()


def facts(**changes: Any) -> dict[str, Any]:
    """Those of write_run's runs with some parts changed, `hardware__ranks=4`."""
    found = copy.deepcopy(FACTS)
    for name, value in changes.items():
        part, _, key = name.partition("__")
        if key:
            found[part][key] = value
        else:
            found[part] = value
    return found


def test_an_earlier_run_of_its_like(tmp_path: Path) -> None:
    write_run(tmp_path / "earlier", samples=0)
    found = expected_time(tmp_path / "run", facts(), RUN, accumulation=1)
    assert found == (0.5, 16.0, "as earlier on the same hardware")
    found = expected_time(tmp_path / "run", facts(tokens=300), RUN, accumulation=2)
    assert found == (3.0, 16.0, "as earlier on the same hardware, its 0.5 s scaled by tokens")


@pytest.mark.parametrize(
    "change",
    [
        {"hardware__device": "NVIDIA L4"},
        {"hardware__ranks": 4},
        {"base__precision": "float8"},
        {"base__zero_stage": 3},
        {"data__encoded": False},
        {"lora__groups": {"mlp, image": {"layers": 4, "parameters": 4096}}},
    ],
)
def test_runs_of_another_kind_tell_nothing(tmp_path: Path, change: dict[str, Any]) -> None:
    write_run(tmp_path / "earlier", samples=0)
    found = expected_time(tmp_path / "run", facts(**{"hardware__device": "NVIDIA L4"} | change), RUN, accumulation=1)
    assert found is None


def test_another_optimizer_takes_another_time(tmp_path: Path) -> None:
    write_run(tmp_path / "earlier", samples=0, optimizer="adafactor")
    l4 = facts(hardware__device="NVIDIA L4")
    write_run(tmp_path / "adamw", samples=0)
    muon = replace(RUN, optimizer=Optimizer(name="muon"))
    assert expected_time(tmp_path / "run", l4, muon, accumulation=1) is None
    measured = expected_time(tmp_path / "elsewhere" / "run", facts(tokens=4224), muon, accumulation=1)
    assert measured is not None and "with AdamW: Muon takes longer" in measured.source
    adafactor = replace(RUN, optimizer=Optimizer(name="adafactor"))
    found = expected_time(tmp_path / "run", facts(), adafactor, accumulation=1)
    assert found is not None and found.source == "as earlier on the same hardware"


def test_the_newest_with_enough_rows_is_taken(tmp_path: Path) -> None:
    import os

    for number, (name, steps) in enumerate((("old", 50), ("new", 60), ("short", 2), ("broken", 50))):
        folder = write_run(tmp_path / name, steps=steps, samples=0)
        os.utime(folder / "events.jsonl", (1e9 + number, 1e9 + number))
    (tmp_path / "broken" / "events.jsonl").write_text('{"event": "start", "step": 0, "facts": {"hardware": 1}}\n')
    found = expected_time(tmp_path / "run", facts(), RUN, accumulation=1)
    assert found is not None and found.source == "as new on the same hardware"


def test_the_measurements_on_an_h100(tmp_path: Path) -> None:
    """A step in bf16 with every block recomputed takes 0.418 s at 4,224 tokens (README)."""
    found = expected_time(tmp_path / "run", facts(tokens=4224), RUN, accumulation=1)
    assert found is not None and found.step == pytest.approx(0.418, rel=0.01) and found.start is None
    twice = expected_time(tmp_path / "run", facts(tokens=4224), RUN, accumulation=2)
    assert twice is not None and twice.step == pytest.approx(2 * found.step)
    assert expected_time(tmp_path / "run", facts(hardware__device="CPU (x86_64, 2 cores)"), RUN, 1) is None


def test_facts_of_old_runs_without_tokens(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "earlier", samples=0)
    old = {name: value for name, value in FACTS.items() if name != "tokens"}
    event = {"event": "start", "step": 0, "text": "training begins", "facts": old}
    (folder / "events.jsonl").write_text(json.dumps(event) + "\n")
    found = expected_time(tmp_path / "run", facts(tokens=300), RUN, accumulation=1)
    assert found is not None and found.step == 0.5
