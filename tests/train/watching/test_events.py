"""events.jsonl: what happened to a run, over all its starts; never a reason to end one."""

import json
from pathlib import Path
from typing import Any

import pytest

from tests.helpers.training_run import train
from train.watching.events import EVENTS, Events


def events_of(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / EVENTS).read_text(encoding="utf-8").splitlines()]


def test_a_run_and_its_resumption_tell_what_happened(small_events_run: Path) -> None:
    found = events_of(small_events_run)
    kinds = [event["event"] for event in found]
    assert kinds[0] == "start" and kinds.count("resume") == 1 and kinds.count("end") == 2
    assert [event["step"] for event in found if event["event"] == "end"] == [2, 4]
    saved = [event["text"] for event in found if event["event"] == "saved"]
    assert any(text.startswith("checkpoint of step 2") for text in saved)
    assert any("LoRA of step 4" in text for text in saved)
    warned = [event["text"] for event in found if event["event"] == "warning"]
    assert any("learning rate 0.2 is far above" in text for text in warned)
    ends = [event for event in found if event["event"] == "end"]
    assert all(end["exit_code"] == 0 and end["peak_bytes"] > 2**20 for end in ends)


def test_the_first_event_holds_the_facts_of_the_run(small_events_run: Path) -> None:
    facts = events_of(small_events_run)[0]["facts"]
    assert facts["hardware"]["ranks"] == 1 and facts["hardware"]["device"].startswith("CPU (")
    assert facts["data"]["samples"] == 12 and facts["data"]["held_out"] == 2 and facts["data"]["encoded"]
    assert sum(count for _, _, count in facts["data"]["buckets"]) == 12
    # rank 2 on to_q of one block of width 128
    assert facts["lora"] == {
        "trainable": 2 * (128 + 128),
        "groups": {"attention, image": {"layers": 1, "parameters": 512}},
    }
    assert facts["steps"] == 2 and facts["global_batch"] == 1 and facts["memory"]["device"]["base"] > 0


def test_a_new_run_forgets_and_a_full_disk_ends_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    Events(tmp_path, new=True).write("note", 1, "one")
    Events(tmp_path, new=False).write("note", 2, "two\u2028 </script> é", facts={"a": 1})
    assert [event["text"] for event in events_of(tmp_path)] == ["one", "two\u2028 </script> é"]
    assert len((tmp_path / EVENTS).read_bytes().splitlines()) == 2
    events = Events(tmp_path, new=True)
    assert not (tmp_path / EVENTS).exists()

    def full(*_: Any, **__: Any) -> Any:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("train.watching.events.open", full, raising=False)
    events.write("note", 1, "lost")
    assert not (tmp_path / EVENTS).exists()


@pytest.fixture(scope="module")
def small_events_run(small_model: Path, small_data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two steps, then two more from the checkpoint."""
    output = tmp_path_factory.mktemp("events") / "run"
    more = ["--validation_samples", "2", "--learning_rate", "0.2", "--save_steps", "2"]
    for steps in ("2", "4"):
        assert train(small_model, small_data, output, *more, "--max_steps", steps) == 0
    return output
