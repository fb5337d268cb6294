"""The caption levers through train_lora.main: what is told, validation that doesn't vary, refusals."""

import json
from pathlib import Path

import pytest

from data_prep import encode_shards
from tests.helpers.caption_levers import LEVERS, TRIGGER, write_captioned
from tests.helpers.training_run import train


@pytest.fixture(scope="module")
def images(tmp_path_factory) -> Path:
    return write_captioned(tmp_path_factory.mktemp("captions") / "images")


def rows(output: Path, name: str) -> list[float]:
    found = [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]
    return [row[name] for row in found if name in row]


def test_a_resumed_run_is_told_that_its_captions_changed(tiny_model, images, tmp_path, capsys):
    assert train(tiny_model, images, tmp_path / "run", "--max_steps", "1", *TRIGGER) == 0
    assert "captions: --trigger_word zwx --caption_suffix 'at night'\n" in capsys.readouterr().out
    assert train(tiny_model, images, tmp_path / "run", "--max_steps", "2", *TRIGGER[:2], *LEVERS[:1]) == 0
    said = capsys.readouterr().out
    assert (
        'resuming with another option: config.caption_suffix is "at night" in the checkpoint, null in this run' in said
    )
    assert (
        "resuming with another option: config.caption_shuffle_tags is false in the checkpoint, true in this run" in said
    )
    assert "captions: --trigger_word zwx --caption_shuffle_tags, drawn anew for each sample of each epoch" in said


def test_encoded_captions_are_refused_before_weights_with_the_command_that_makes_others(small_data, tmp_path, capsys):
    model = tmp_path / "model"  # without any weights
    model.mkdir()
    (model / "model_index.json").write_text("{}")
    for more in ([], ["--loader", "webdataset"], ["--dry_run"]):
        assert train(model, small_data, tmp_path / "run", *LEVERS, *more) == 2
        error = capsys.readouterr().err
        assert "are encoded already (as they stood), so that --caption_alternatives" in error
        assert "--caption_variants 8 --caption_alternatives --caption_shuffle_tags --caption_keep_tags 1" in error
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["--caption_keep_tags", "2"], "caption_keep_tags 2 changes nothing without"),
        (
            ["--caption_alternatives", "--caption_tag_separator", "|"],
            "caption_tag_separator '|' changes nothing without",
        ),
        (["--caption_tag_dropout", "1.5"], "caption_tag_dropout"),
        (["--caption_shuffle_tags", "--caption_tag_separator", " "], "something besides white space"),
        (["--trigger_word", "a\x1bb"], "trigger_word: a control character (code 27)"),
    ],
)
def test_flags_that_cannot_be_meant_are_one_line(small_model, small_data, tmp_path, capsys, flags, said):
    assert train(small_model, small_data, tmp_path / "run", *flags) == 2
    error = capsys.readouterr().err.strip()
    assert said in error and "\n" not in error


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


def test_validation_of_encoded_variants_is_that_of_the_first_forms(tiny_model, images, encoded, tmp_path):
    """The first alternative is taken where alternatives are drawn: so both sets are encoded with them."""
    flags = ["--model", str(tiny_model), "--data", str(images), "--dtype", "float32", "--num_workers", "1", *TRIGGER]
    levers = [each for each in LEVERS if each != "--caption_alternatives"]
    for name, more in (("one", []), ("six", [*levers, "--caption_variants", "6"])):
        assert encode_shards.main([*flags, "--output_path", str(tmp_path / name), *more]) == 0
        assert (
            train(
                tiny_model, tmp_path / name, tmp_path / f"run-{name}", "--max_steps", "1", "--validation_samples", "3"
            )
            == 0
        )
    for name in ("validation_loss", "training_subset_loss"):
        found = [rows(tmp_path / f"run-{each}", name)[0] for each in ("one", "six")]
        assert found[0] == found[1]


def test_other_captions_than_the_encoded_ones_are_refused(tiny_model, encoded, tmp_path, capsys):
    assert train(tiny_model, encoded[1], tmp_path / "run", "--trigger_word", "other") == 2
    assert "are encoded already (--trigger_word zwx --caption_suffix 'at night' " in capsys.readouterr().err
