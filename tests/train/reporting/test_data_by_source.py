"""Images × weight by source, told alike by the dry run, the table at the start and the report of the run."""

import json
import os
import re
from pathlib import Path

import pytest

from demo.random_model import write_random_encoded
from tests.helpers.data_sets import give_weights
from tests.helpers.training_run import ROOT, train
from train import train_lora
from train.reporting.data_by_source import lines_by_source
from train.reporting.data_summary import data_summary
from train.reporting.run_record import read_run


@pytest.fixture
def sets(tmp_path: Path) -> dict[str, Path]:
    folders = {name: tmp_path / name for name in ("cats", "dogs", "reg")}
    for (name, folder), samples in zip(folders.items(), (20, 9, 7), strict=True):
        write_random_encoded(folder, samples, 32, 48, prompt_tokens=6, text_dim=64, buckets=2)
        assert name in str(folder)
    give_weights(folders["cats"], [10.0] * 5 + [1.0] * 15)
    return folders


def test_dry_run_table_and_report_say_the_same(small_model, sets, tmp_path, capsys) -> None:
    flags = ["--data", f"{sets['dogs']}:0.5", "--prior_data", str(sets["reg"]), "--prior_weight", "0.5"]
    told = [
        f"{sets['cats']}: 5 × 10 + 15 × 1 = 65 an epoch",
        f"{sets['dogs']}: 9 × 0.5 = 4.5 an epoch",
        f"prior, {sets['reg']}: 7 × 1 = 7 an epoch; 0.5 of the micro-batches, loss × 0.5",
    ]
    common = [*flags, "--save_steps", "0"]
    before = sorted(os.listdir(tmp_path))
    assert train(small_model, sets["cats"], tmp_path / "run", *common, "--dry_run") == 0
    assert sorted(os.listdir(tmp_path)) == before, "a dry run leaves nothing"
    dry = capsys.readouterr().out
    assert all(f"\n  {line}\n" in dry for line in told), dry
    assert "36 samples" in dry and "20 samples, by their weights 65 an epoch" not in dry
    assert "29 samples, by their weights 69.5 an epoch" in dry and "prior: 7 samples in 2 buckets" in dry
    assert train(small_model, sets["cats"], tmp_path / "run", *flags, "--save_steps", "0") == 0
    table = capsys.readouterr().out
    assert all(f"           {line}\n" in table for line in told), table
    events = (tmp_path / "run" / "events.jsonl").read_text().splitlines()
    facts = json.loads(events[0])["facts"]["data"]
    assert [(each["samples"], each["an_epoch"]) for each in facts["sources"]] == [(20, 65), (9, 4.5), (7, 7)]
    rows = data_summary(read_run(tmp_path / "run"), tmp_path / "run")["rows"]
    assert [text for name, text in rows if name == "images × weight"] == told
    page = (tmp_path / "run" / "report.html").read_text()
    assert all(line in page for line in told)
    assert f"data:\n- {sets['cats']}\n- {sets['dogs']}:0.5\n" in (tmp_path / "run" / "config.yaml").read_text()


def test_an_epoch_is_the_subjects(small_model, sets, tmp_path, capsys) -> None:
    """35 + 34.5 repeats of cats and dogs in batches of one are 70 micro-batches; with half of them of the prior 139 steps."""
    flags = ["--deepspeed", str(ROOT / "ds_configs" / "zero2.json"), "--model", str(small_model), "--dtype", "float32"]
    flags += ["--output_path", str(tmp_path / "run"), "--lora_rank", "2", "--num_epochs", "1", "--dry_run"]
    data = ["--data", str(sets["cats"]), f"{sets['dogs']}:0.5"]
    assert train_lora.main([*flags, *data]) == 0
    alone = int(re.findall(r"(\d+) steps of 1 samples", capsys.readouterr().out)[0])
    assert train_lora.main([*flags, *data, "--prior_data", str(sets["reg"])]) == 0
    both = int(re.findall(r"(\d+) steps of 1 samples", capsys.readouterr().out)[0])
    assert abs(alone - 69.5) <= 1 and both == 2 * alone - 1, (
        "the first micro-batch is the subject's, and so is the last"
    )


def test_what_is_one_set_without_weights_is_told_as_before(small_model, small_data, tmp_path, capsys) -> None:
    assert train(small_model, small_data, tmp_path / "run") == 0
    assert "an epoch" not in capsys.readouterr().out.partition("  run  ")[2].partition("  steps")[0]
    facts = json.loads((tmp_path / "run" / "events.jsonl").read_text().splitlines()[0])["facts"]["data"]
    assert "sources" not in facts


def test_many_weights_are_a_range_and_hostile_facts_are_passed_over() -> None:
    entry = {"name": "a\x1b[2J", "samples": 9, "an_epoch": 20.25, "weights": 9, "largest": [[5.0, 1]] * 4, "least": 0.1}
    lines = list(lines_by_source([entry, {"name": "x"}, "text"]))  # type: ignore[list-item]
    assert len(lines) == 1 and "9 of weights 0.1 to 5 = 20.25 an epoch" in lines[0] and "\x1b" not in lines[0]


@pytest.mark.parametrize(
    "flags, message",
    [
        (["--data", "{}/none:2"], "data: no folder at {}/none"),
        (["--prior_data", "{}/none"], "prior_data: no folder at {}/none"),
        (["--data", "{}/dogs:0"], "{}/dogs:0: what follows the last colon is a weight and must be from 0.001 to 1000"),
        (["--output_path", "{}/dogs/run", "--data", "{}/dogs:2"], "lies in data"),
        (["--output_path", "{}/reg/run", "--prior_data", "{}/reg"], "lies in prior_data"),
        (["--prior_data", "{}/reg/../cats:2"], "prior_data: {}/cats is data too"),
        (
            ["--prior_data", "{}/reg", "--tail", "drop", "--batch_size", "5"],
            "prior_data: 7 samples × dataset_repeat 1 in 2 buckets",
        ),
        (["--data", "{}/dogs", "--loader", "webdataset", "--max_steps", "1"], "loader webdataset reads one set"),
    ],
)
def test_what_cannot_be_is_refused_in_one_line(small_model, sets, tmp_path, capsys, flags, message) -> None:
    given = [flag.format(tmp_path) for flag in flags]
    assert train(small_model, sets["cats"], tmp_path / "run", *given) == 2
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert error.startswith("error: ") and message.format(tmp_path) in error
