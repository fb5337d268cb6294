"""A run in one paragraph, its verdict, what differs between runs."""

import json
from pathlib import Path

import pytest

from tests.helpers.run_folders import write_run
from train.reporting.run_record import RunRecord, read_run
from train.reporting.story import chosen_options, differences, duration, paragraph, tiles, verdict


def test_the_paragraph_names_data_model_lora_hardware_and_result(tmp_path: Path) -> None:
    text = paragraph(read_run(write_run(tmp_path / "cats", lora_target_modules="attention,mlp")))
    assert text.startswith(
        "A LoRA of rank 8 on attention, mlp (4,096 trainable parameters) for “models/tiny” in bfloat16, trained for 100 of 100 "
        "steps of 4 samples on the 36 samples (in 2 sizes) of “encoded”. On 2 × NVIDIA H100 80GB HBM3, a step took 0.5 s (50 s "
        "of training in all). The training loss went from 1.85"
    )
    # held out: lowest at step 60 (0.5), 0.16 above it at the end
    assert text.endswith(
        "On held-out samples it went from 0.86 (step 0) to 0.66 (step 100), 32.0% above its lowest of 0.5 at step 60: trained "
        "too long, or at too high a rate; lora-60.safetensors is from there."
    )


def test_several_sets_are_named_as_they_were_given(tmp_path: Path) -> None:
    text = paragraph(read_run(write_run(tmp_path / "cats", data=["cats", "dogs:0.5"])))
    assert "of “cats + dogs:0.5”." in text


def test_the_loss_that_is_told_is_the_subject_s(tmp_path: Path) -> None:
    """Prior samples begin near 0 or wherever their pictures lie: a share of them in the mean reads as progress."""
    folder = write_run(tmp_path / "cats")
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    rows = [row | {"loss/subject": 3.0, "loss/prior": 0.0} if "loss" in row else row for row in rows]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert "The training loss of the subject went from 3 to 3 (" in paragraph(read_run(folder))


def test_little_is_known_of_an_empty_run(tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").touch()
    run = read_run(tmp_path)
    assert "an unknown model" in paragraph(run) and tiles(run) == [("0", "steps")]
    assert verdict(run) == ("no end yet: step 0", "warn")


@pytest.mark.parametrize(
    ("code", "text", "mood"),
    [
        (0, "done: step 10 of 100", "good"),
        (85, "asked to leave: step 10 of 100", "warn"),
        (130, "asked to leave: step 10 of 100", "warn"),
        (3, "not finite: step 10 of 100", "bad"),
        (4, "exit code 4: step 10 of 100", "bad"),
    ],
)
def test_the_verdict(tmp_path: Path, code: int, text: str, mood: str) -> None:
    rows = [
        {"event": "start", "step": 0, "facts": {"steps": 100}},
        {"event": "end", "step": 10, "text": "x", "exit_code": code},
    ]
    (tmp_path / "events.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert verdict(read_run(tmp_path)) == (text, mood)


def test_a_run_that_was_resumed_has_no_end_yet(tmp_path: Path) -> None:
    kinds = ["start", "end", "resume"]
    rows = [{"event": kind, "step": 5, "text": "x", "exit_code": 85} for kind in kinds]
    (tmp_path / "events.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert verdict(read_run(tmp_path)).text == "no end yet: step 5"


def test_differences_and_chosen_options(tmp_path: Path) -> None:
    one, two = (read_run(write_run(tmp_path / f"{rank}", samples=0, lora_rank=rank, seed=7)) for rank in (8, 16))
    assert differences([one, two]) == [("lora_rank", ["8", "16"])]
    chosen = dict(chosen_options(one))
    assert chosen["lora_rank"] == "8" and chosen["seed"] == "7" and "learning_rate" not in chosen and "model" in chosen
    assert differences([one, RunRecord(tmp_path, "empty")])  # options of which nothing is known differ, too


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0.123, "0.12 s"), (42, "42 s"), (60, "1 min"), (185, "3 min 5 s"), (8040, "2 h 14 min"), (273600, "3 d 4 h")],
)
def test_durations(seconds: float, text: str) -> None:
    assert duration(seconds) == text
