"""Validation: by σ, on held-out and on training samples, with fewer samples than ranks, with samples that can't be read."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.torch import load_file

from tests.helpers.forked_ranks import import_once, run_ranks  # noqa: F401 (a fixture)
from tests.helpers.training_run import train
from train.data.shard_dataset import ShardDataset
from train.saving.final_file import lora_facts
from train.saving.keep_best import BEST, Best
from train.watching.validation import SIGMAS

FAST = ["--activation_checkpointing", "full", "--cuda_graphs", "off", "--save_steps", "0"]


def train_all(model: Path, data: Path, runs: list[tuple[Path, list[str]]]) -> list[int]:
    return [train(model, data, output, *FAST, *more) for output, more in runs]


def rows(output: Path, name: str = "validation_loss") -> list[dict[str, Any]]:
    every = [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]
    return [row for row in every if name in row]


def test_one_sample_held_out_at_one_and_three_ranks(small_model: Path, small_data: Path, tmp_path: Path) -> None:
    """Two of three ranks have nothing of their own to measure, and the values are those of one rank."""
    more = ["--validation_samples", "1", "--validation_training_samples", "2", "--learning_rate", "1e-2"]
    for world in (1, 3):
        flags = [*more, "--gradient_accumulation_steps", str(3 // world), "--max_steps", "2"]
        runs = [(tmp_path / str(world), flags)]
        assert run_ranks(world, train_all, small_model, small_data, runs) == [0]
    one, three = rows(tmp_path / "1"), rows(tmp_path / "3")
    assert [row["step"] for row in one] == [row["step"] for row in three] == [0, 2]
    assert one[0] == pytest.approx(three[0], rel=1e-6) and one[1] == pytest.approx(three[1], rel=1e-5)
    for row in one:
        for name in ("validation_loss", "training_subset_loss"):
            parts = [row[f"{name}/sigma_{sigma}"] for sigma in SIGMAS]
            assert np.mean(parts) == pytest.approx(row[name], rel=1e-9) and len(set(parts)) == len(SIGMAS)
        assert row["validation_gap"] == row["validation_loss"] - row["training_subset_loss"]


def test_the_gap_shows_learning_by_heart_and_the_best_is_kept(
    small_model: Path, small_data: Path, tmp_path: Path
) -> None:
    """Samples are noise, so there is nothing in them that would hold for others: what is learned is these."""
    more = ["--validation_samples", "10", "--validation_steps", "20", "--learning_rate", "5e-3", "--max_steps", "160"]
    more += ["--lora_rank", "16", "--lora_target_modules", "all", "--keep_best", "--save_steps", "20"]
    assert run_ranks(1, train_all, small_model, small_data, [(tmp_path / "run", more)]) == [0]
    found = rows(tmp_path / "run")
    assert [row["step"] for row in found] == list(range(0, 161, 20))
    begin, end = ([row[name] for name in ("validation_loss", "training_subset_loss")] for row in (found[0], found[-1]))
    assert end[0] / end[1] > 1.04 * begin[0] / begin[1] and end[1] < 0.7 * begin[1]
    best = min(found[1:], key=lambda row: row["validation_loss"])
    facts = lora_facts(tmp_path / "run" / BEST)
    assert facts["step"] == str(best["step"]) and float(facts["validation_loss"]) == best["validation_loss"]
    name = "lora.safetensors" if best["step"] == 160 else f"lora-{best['step']}.safetensors"
    kept, same = (load_file(tmp_path / "run" / each) for each in (BEST, name))
    assert kept.keys() == same.keys() and all((kept[key] == same[key]).all() for key in kept)


def test_the_training_subset_is_fixed_and_apart(small_data: Path) -> None:
    dataset = ShardDataset(small_data, validation_samples=3)
    chosen = dataset.training_subset(4)
    assert len(chosen) == 4 and not set(chosen) & set(dataset.validation) and set(chosen) <= set(dataset.training)
    assert list(ShardDataset(small_data, validation_samples=3).training_subset(4)) == list(chosen)
    assert list(dataset.training_subset(99)) == list(dataset.training)


def test_a_held_out_sample_that_cannot_be_read(small_model: Path, small_data: Path, tmp_path: Path) -> None:
    """It is left out on all ranks and named, or ends the run with one line."""
    import shutil

    data = shutil.copytree(small_data, tmp_path / "data")
    dataset = ShardDataset(data, validation_samples=3)
    index, broken = dataset.index, int(dataset.validation[1])
    shard = data / dataset.reader.names[int(index.shard[broken])]
    whole = bytearray(shard.read_bytes())
    start = int(index.payload_offset[broken])
    whole[start : start + 64] = b"\0" * 64
    shard.write_bytes(whole)
    more = ["--validation_samples", "3", "--validation_training_samples", "0", "--max_steps", "1"]
    more += ["--gradient_accumulation_steps", "1"]
    runs = [(tmp_path / "skip", more), (tmp_path / "stop", [*more, "--on_broken_sample", "stop"])]
    assert run_ranks(2, train_all, small_model, data, runs) == [0, 2]
    assert rows(tmp_path / "skip") and not rows(tmp_path / "skip", "training_subset_loss")


def test_what_is_best(tmp_path: Path) -> None:
    best = Best(enabled=True)
    assert not best.improves(0, 1.0, None) and best.line() is None
    assert not best.improves(5, float("nan"), None)
    assert best.improves(10, 1.2, 1.1) and best.averaged and best.loss == 1.1
    assert "without the LoRA it was 1, lower still" in str(best.line())
    assert best.improves(20, 0.9, 1.3) and not best.averaged and not best.improves(30, 0.9, None)
    state, said = json.loads(json.dumps(best.state())), list[str]()
    again = Best.resumed(True, state, tmp_path, said.append)
    assert again.step is None and again.before == 1.0 and "step 20 is gone" in said[0]
    assert Best(enabled=False).state() is None and not Best().improves(1, 0.1, None)


def test_keep_best_needs_a_validation(small_model: Path, small_data: Path, tmp_path: Path, capsys: Any) -> None:
    assert train(small_model, small_data, tmp_path / "run", "--keep_best") == 2
    assert "keep_best chooses by the validation loss: give validation_samples" in capsys.readouterr().err
