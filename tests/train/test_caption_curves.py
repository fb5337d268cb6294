"""Caption levers and encoded variants give one curve over ranks and interruptions; validation stays beside it.

In a file of its own: its ranks are forked from a process in which nothing was trained.
"""

import json
from pathlib import Path

import pytest

from data_prep import encode_shards
from tests.helpers.caption_levers import LEVERS, TRIGGER, write_captioned
from tests.helpers.forked_ranks import import_once, run_ranks  # noqa: F401 (a fixture)
from tests.helpers.training_run import losses
from train import train_lora

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def images(tmp_path_factory) -> Path:
    return write_captioned(tmp_path_factory.mktemp("captions") / "images")


def command(model: Path, data: Path, output: Path, world: int, steps: int, *more: str) -> list[list[str]]:
    flags = ["--deepspeed", str(ROOT / "ds_configs" / "zero2.json"), "--model", str(model), "--data", str(data)]
    flags += ["--output_path", str(output), "--dtype", "float32", "--lora_rank", "2", "--lora_target_modules", "to_q"]
    flags += ["--num_workers", "0", "--log_steps", "1", "--wandb_mode", "disabled", "--max_steps", str(steps)]
    flags += ["--gradient_accumulation_steps", str(2 // world), "--caption_dropout", "0.2", "--learning_rate", "1e-2"]
    return [[*flags, "--validation_samples", "2", "--validation_steps", "1", *more]]


def run(commands: list[list[str]]) -> list[int]:
    return [train_lora.main(each) for each in commands]


def rows(output: Path, name: str) -> list[float]:
    found = [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]
    return [row[name] for row in found if name in row]


def test_one_curve_on_two_ranks_and_resumed_on_one(tiny_model, images, tmp_path):
    levers = [*LEVERS, *TRIGGER]
    assert run_ranks(1, run, command(tiny_model, images, tmp_path / "whole", 1, 4, *levers)) == [0]
    for world, steps in ((2, 2), (1, 4)):
        assert run_ranks(world, run, command(tiny_model, images, tmp_path / "moved", world, steps, *levers)) == [0]
    assert losses(tmp_path / "moved") == pytest.approx(losses(tmp_path / "whole"), rel=2e-6)
    assert run_ranks(1, run, command(tiny_model, images, tmp_path / "plain", 1, 4, *TRIGGER, LEVERS[-1])) == [0]
    assert losses(tmp_path / "plain")[0] != losses(tmp_path / "whole")[0], "the levers do something"
    for name in ("validation_loss", "training_subset_loss"):
        first = [rows(tmp_path / each, name)[0] for each in ("whole", "plain")]
        assert first[0] == first[1], f"{name} doesn't vary with shuffled and dropped tags"


@pytest.fixture(scope="module")
def encoded(images, tiny_model, tmp_path_factory) -> list[Path]:
    """The first forms alone; and six variants of each caption."""
    folder, found = tmp_path_factory.mktemp("captions"), []
    for more in (TRIGGER, [*TRIGGER, *LEVERS, "--caption_variants", "6"]):
        found.append(folder / f"encoded{len(found)}")
        flags = ["--model", str(tiny_model), "--data", str(images), "--output_path", str(found[-1])]
        flags += ["--dtype", "float32"]
        assert encode_shards.main([*flags, "--num_workers", "1", *more]) == 0
    return found


def test_encoded_variants_give_one_curve_and_validate_on_the_first(tiny_model, encoded, tmp_path, capfd):
    first, variants = encoded
    assert run_ranks(1, run, command(tiny_model, variants, tmp_path / "whole", 1, 4)) == [0]
    said = capfd.readouterr().out
    assert "captions were encoded --trigger_word zwx" in said and "in 6 variants, of which one is drawn" in said
    same = [*TRIGGER, *LEVERS]  # said again in training, as one file for both commands has it
    for world, steps, more in ((2, 2, []), (1, 4, same)):
        assert run_ranks(world, run, command(tiny_model, variants, tmp_path / "moved", world, steps, *more)) == [0]
    assert losses(tmp_path / "moved") == pytest.approx(losses(tmp_path / "whole"), rel=2e-6)
    assert run_ranks(1, run, command(tiny_model, first, tmp_path / "first", 1, 4)) == [0]
    assert losses(tmp_path / "first") != losses(tmp_path / "whole"), "the variants do something"
    remote = [*("--data_cache_path", str(tmp_path / "cache")), "--data_cache_gb", "1"]
    assert run_ranks(1, run, command(tiny_model, f"file://{variants}", tmp_path / "remote", 1, 4, *remote)) == [0]
    assert losses(tmp_path / "remote") == losses(tmp_path / "whole")
