"""A local data set that was edited in place between two starts of a run: refused by name; one that was copied goes on."""

import os
import shutil
from pathlib import Path

import pytest

from data_prep.shard_format import shard_changes
from tests.helpers.data_sets import write_set
from tests.helpers.training_run import losses, train
from train.data.shard_dataset import ShardDataset

NO_TRIALS = ("--activation_checkpointing", "full", "--cuda_graphs", "off", "--save_steps", "0")


def flip(path: Path, place: int = 700) -> None:
    """One bit, in place; a file system whose clock is coarse would give the same time of change, so it is moved on."""
    with path.open("r+b") as file:
        file.seek(place)
        (byte,) = file.read(1)
        file.seek(place)
        file.write(bytes([byte ^ 1]))
    os.utime(path, ns=(0, path.stat().st_mtime_ns + 1))


@pytest.fixture
def folder(tmp_path):
    return write_set(tmp_path / "set", 12, shard_size=5)


def said_of(folder, remembered):
    said = []
    ShardDataset(folder).check_unchanged(remembered, said.append)
    return said


def test_what_has_not_changed_is_not_read(folder, monkeypatch):
    remembered = ShardDataset(folder).shard_states()
    monkeypatch.setattr(shard_changes, "digest", lambda path: pytest.fail("nothing has to be compared"))
    assert said_of(folder, remembered) == []
    assert said_of(folder, {}) == []  # a checkpoint of before this was remembered


def test_a_copy_is_compared_and_goes_on(folder, tmp_path):
    remembered = ShardDataset(folder).shard_states()
    os.utime(folder / "000001.tar")
    assert said_of(folder, remembered) == [
        "1 of 3 shards have changed since then, by their time; they were compared, and their bytes are the same"
    ]
    copied = shutil.copytree(folder, tmp_path / "elsewhere", copy_function=shutil.copy)
    assert "3 of 3 shards" in said_of(copied, remembered)[0]


@pytest.mark.parametrize("damage", ["flipped", "cut", "longer"])
def test_an_edited_shard_is_named(folder, damage):
    remembered = ShardDataset(folder).shard_states()
    shard = folder / "000001.tar"
    if damage == "flipped":
        flip(shard)
    elif damage == "cut":
        os.truncate(shard, shard.stat().st_size - 1)
    else:
        with shard.open("ab") as file:
            file.write(b"\0" * 512)
    with pytest.raises(
        ValueError, match=r"1 of 3 shards in .*set were edited since .* not what manifest.json says \(000001"
    ):
        said_of(folder, remembered)


def test_too_much_to_compare_is_said(folder, monkeypatch):
    remembered = ShardDataset(folder).shard_states()
    flip(folder / "000001.tar")
    monkeypatch.setattr(shard_changes, "COMPARED_BYTES", 100)
    assert "too much to compare at a start): check_shards.py can tell" in said_of(folder, remembered)[0]
    os.truncate(folder / "000002.tar", 3)  # sizes cost nothing
    with pytest.raises(ValueError, match=r"000002\.tar"):
        said_of(folder, remembered)


def test_the_command_refuses_and_a_flag_lets_it_pass(small_model, small_data, tmp_path, capfd):
    data, run = shutil.copytree(small_data, tmp_path / "data"), tmp_path / "run"
    assert train(small_model, data, run, "--max_steps", "2", *NO_TRIALS) == 0
    before = {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}
    flip(data / "000000.tar")
    assert train(small_model, data, run, "--max_steps", "4", *NO_TRIALS) == 2
    error = capfd.readouterr().err.strip().splitlines()[-1]
    assert error.startswith("error: data: 1 of 1 shards in ") and "--resume_ignore_data" in error
    assert {path: path.read_bytes() for path in run.rglob("*") if path.is_file()} == before
    assert train(small_model, data, run, "--max_steps", "4", "--resume_ignore_data", "true", *NO_TRIALS) == 0
    assert len(losses(run)) == 4
