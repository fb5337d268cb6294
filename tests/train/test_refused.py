"""What train_lora.py refuses, it refuses before the model is read, and without having written anything."""

from pathlib import Path

import pytest

from tests.helpers.training_run import train

NO_TRIALS = ("--activation_checkpointing", "full", "--cuda_graphs", "off")


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


@pytest.fixture
def run(small_model, small_data, tmp_path, monkeypatch):
    """A run folder with a checkpoint of rank 2; from here on the model must not be read."""
    assert train(small_model, small_data, tmp_path / "run", *NO_TRIALS) == 0

    def read(*arguments, **more):
        raise AssertionError("the model is read")

    monkeypatch.setattr("train.base_model.load_pipeline.load_pipeline", read)
    return tmp_path / "run"


@pytest.mark.parametrize(
    "more,message",
    [
        (("--lora_rank", "8"), "lora.rank is 2 in the checkpoint, 8 in this run"),
        (("--lora_target_modules", "to_k"), "lora."),
        (("--seed", "5"), "order.seed is 0 in the checkpoint, 5 in this run"),
    ],
    ids=["rank", "targets", "order"],
)
def test_a_refused_resume_changes_nothing(small_model, small_data, run, capsys, more, message):
    before = contents(run)
    assert train(small_model, small_data, run, "--max_steps", "8", *more, *NO_TRIALS) == 2
    assert message in capsys.readouterr().err and contents(run) == before


def test_a_refused_new_run_leaves_no_folder(small_model, small_data, tmp_path, run):
    assert train(small_model, small_data, tmp_path / "new", "--resume", str(run), "--seed", "5", *NO_TRIALS) == 2
    assert not (tmp_path / "new").exists()


def test_where_the_last_step_is_reached_it_says_so(small_model, small_data, run, capsys):
    before = contents(run)
    for steps in ("4", "2"):
        assert train(small_model, small_data, run, "--max_steps", steps, *NO_TRIALS) == 0
        said = capsys.readouterr().out
        assert "already done: LoRA of step 4: " in said and "to go on, raise --max_steps" in said
    assert contents(run) == before


@pytest.mark.parametrize("option", ["data", "model"])
@pytest.mark.parametrize("place,how", [(".", "is"), ("run", "lies in"), ("..", "lies around")])
def test_the_run_folder_lies_apart(small_model, small_data, capsys, option, place, how):
    folder = small_data if option == "data" else small_model
    names = sorted(path.name for path in folder.iterdir())
    assert train(small_model, small_data, folder / place, *NO_TRIALS) == 2
    error = capsys.readouterr().err
    assert f" {how} {option} ({folder}): choose another folder" in error, error
    assert sorted(path.name for path in folder.iterdir()) == names
