"""Checkpoints on the disk: whole or refused, the newest that is whole, other runs' refused with what differs."""

import os
import shutil
import subprocess
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from qwen_image.loading.model_files import weights_fingerprint
from train.saving import checkpoint_folder
from train.saving.checkpoint_folder import FACTS, LATEST, TENSORS, step_folders
from train.saving.checkpoints import Checkpoints, check_same

CLIENT = {"model": "m", "lora": {"rank": 3}, "data": "d", "order": {"seed": 0}}


def write_one(root: Path, step: int, values: float = 1.0, client: dict = CLIENT) -> Path:
    shapes = {"a": [2, 3], "b": [5]}
    facts = {"format_version": 1, "step": step, "counters": {"step": step}, "kinds": ["weight"], "shapes": shapes}
    folder = root / "checkpoints" / f"step-{step:08d}"
    checkpoint_folder.write_checkpoint(folder, facts | {"client": client}, [torch.full((11,), values)])
    return folder


def flip(path: Path, place: int) -> None:
    data = bytearray(path.read_bytes())
    data[place] ^= 1
    path.write_bytes(data)


DAMAGE = {
    "truncated": lambda folder: os.truncate(folder / TENSORS, 60),
    "bit flip in the tensors": lambda folder: flip(folder / TENSORS, -3),
    "bit flip in the header": lambda folder: flip(folder / TENSORS, 20),
    "bit flip in the facts": lambda folder: flip(folder / FACTS, (folder / FACTS).read_text().index('"rank": 3') + 8),
    "empty facts": lambda folder: os.truncate(folder / FACTS, 0),
    "facts missing": lambda folder: (folder / FACTS).unlink(),
    "tensors missing": lambda folder: (folder / TENSORS).unlink(),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_newest_checkpoint_is_named_and_the_one_before_taken(tmp_path, damage):
    for step in (10, 20):
        write_one(tmp_path, step)
    said: list[str] = []
    checkpoints = Checkpoints(tmp_path, say=said.append)
    assert checkpoints.find("auto").step == 20 and not said
    DAMAGE[damage](tmp_path / "checkpoints" / "step-00000020")
    assert checkpoints.find("auto").step == 10
    assert len(said) == 1 and "step-00000020" in said[0] and "trying the one before" in said[0]
    with pytest.raises((ValueError, FileNotFoundError), match="step-00000020"):
        checkpoints.find(str(tmp_path / "checkpoints" / "step-00000020"))
    shutil.rmtree(tmp_path / "checkpoints" / "step-00000010")
    with pytest.raises(ValueError, match=r"all 1 checkpoints .* are damaged"):
        checkpoints.find("auto")


def test_where_a_run_goes_on(tmp_path):
    checkpoints = Checkpoints(tmp_path)
    assert checkpoints.find("auto") is None
    with pytest.raises(FileNotFoundError, match="no checkpoint in"):
        checkpoints.find(str(tmp_path))
    folders = [write_one(tmp_path, step) for step in (10, 20, 30)]
    assert checkpoints.find("never") is None
    for path, step in ((tmp_path, 30), (tmp_path / "checkpoints", 30), (folders[1], 20)):
        assert checkpoints.find(str(path)).step == step
    assert Checkpoints(tmp_path / "other").find(str(folders[0])).client == CLIENT
    write_one(tmp_path, 20, values=2.0)  # gone back to 10, trained to 20 again: 30 is of the run that was given up
    assert checkpoints.find("auto").step == 20
    assert load_file(folders[1] / TENSORS)["weight/b"].tolist() == [2.0] * 5


def test_folders_of_other_names_are_left_alone(tmp_path):
    run = tmp_path / "step-1"  # a run may be called so, or like a checkpoint
    assert Checkpoints(run).find("auto") is None and Checkpoints(tmp_path / "step-00000001").find("auto") is None
    old = write_one(run, 10)
    for name in ("step-00000010.bak", "step-old"):
        shutil.copytree(old, old.with_name(name))
    checkpoint_folder.prune(write_one(run, 20), keep=1, keep_every=15, say=print)
    assert sorted(path.name for path in old.parent.glob("step-*")) == ["step-00000010.bak", "step-00000020", "step-old"]
    assert Checkpoints(run).find("auto").step == 20
    assert Checkpoints(run).find(str(old.with_name("step-00000010.bak"))).step == 10


def test_the_last_n_and_every_mth_stay(tmp_path):
    for step in range(10, 70, 10):
        checkpoint_folder.prune(write_one(tmp_path, step), keep=2, keep_every=30, say=print)
    assert [path.name[-2:] for path in step_folders(tmp_path / "checkpoints")] == ["30", "50", "60"]
    assert (tmp_path / "checkpoints" / LATEST).read_text() == "step-00000060\n"


def test_a_writer_that_dies_leaves_nothing_that_counts(tmp_path):
    write_one(tmp_path, 10)
    with pytest.raises(OSError, match="No space left"):
        write_one_failing(tmp_path, 20)
    names = sorted(path.name for path in (tmp_path / "checkpoints").iterdir())
    assert names == [LATEST, "step-00000010"]
    (tmp_path / "checkpoints" / ".partial-step-00000020").mkdir()  # as kill -9 leaves it
    assert Checkpoints(tmp_path).find("auto").step == 10
    write_one(tmp_path, 20)
    assert sorted(p.name for p in (tmp_path / "checkpoints").iterdir()) == [LATEST, "step-00000010", "step-00000020"]


def write_one_failing(root: Path, step: int) -> None:
    def wholes():
        yield torch.zeros(11)
        raise OSError(28, "No space left on device")

    facts = {"kinds": ["weight", "exp_avg"], "shapes": {"a": [11]}, "step": step}
    checkpoint_folder.write_checkpoint(root / "checkpoints" / f"step-{step:08d}", facts, wholes())


@pytest.mark.skipif(os.geteuid() != 0, reason="mounting needs root")
def test_a_disk_that_is_really_full(tmp_path):
    mount = ["mount", "-t", "tmpfs", "-o", "size=300k", "tmpfs", str(tmp_path)]
    if subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("no permission to mount a tmpfs")
    try:
        write = checkpoint_folder.write_checkpoint
        facts = {"format_version": 1, "counters": {}, "kinds": ["weight"], "shapes": {"a": [50_000]}, "client": {}}
        spare, checkpoint_folder.SPARE_BYTES = checkpoint_folder.SPARE_BYTES, -(1 << 40)  # as if nothing were checked
        write(tmp_path / "step-00000001", facts | {"step": 1}, [torch.zeros(50_000)])
        with pytest.raises(OSError, match="No space left"):
            write(tmp_path / "step-00000002", facts | {"step": 2}, [torch.zeros(50_000)])
        assert [p.name for p in step_folders(tmp_path)] == ["step-00000001"]
        assert checkpoint_folder.read_checkpoint(tmp_path / "step-00000001").step == 1
    finally:
        checkpoint_folder.SPARE_BYTES = spare
        subprocess.run(["umount", str(tmp_path)], check=True)


def test_what_was_best_on_other_data_is_forgotten(tmp_path, monkeypatch):
    """Other samples may be held out: their losses can't be compared."""
    write_one(tmp_path, 10, client=CLIENT | {"consumed": 7, "best": {"loss": 0.5}})
    checkpoints = Checkpoints(tmp_path, say=lambda line: None)
    monkeypatch.setattr(checkpoints, "load", lambda engine, checkpoint: None)
    found = checkpoints.find("auto")
    assert checkpoints.resume(None, found, CLIENT).best == {"loss": 0.5}
    other = checkpoints.resume(None, found, CLIENT | {"data": "e"}, ignore_data=True)
    assert (other.best, other.consumed, other.step) == (None, 0, 10)


def test_another_model_lora_or_data_set_is_refused_with_what_differs(tmp_path):
    write_one(tmp_path, 10)
    found, said = Checkpoints(tmp_path).find("auto"), []
    assert check_same(found, CLIENT)
    with pytest.raises(ValueError, match=r'model is "m" in the checkpoint, "n" in this run; lora\.rank is 3 .* 4'):
        check_same(found, CLIENT | {"model": "n", "lora": {"rank": 4}}, ignore_data=True)
    other = CLIENT | {"data": "e", "order": {"seed": 1}}
    with pytest.raises(ValueError, match=r'data is "d" .*, "e" .*; order\.seed is 0 .*--resume_ignore_data'):
        check_same(found, other)
    with pytest.raises(ValueError, match=r"was trained in another order: order\.seed is 0 .*, 1 in this run"):
        check_same(found, CLIENT | {"order": {"seed": 1}})
    assert check_same(found, other, ignore_data=True, say=said.append) is False
    assert len(said) == 1 and "from its beginning" in said[0]


def test_options_that_have_changed_are_said(tmp_path):
    config = {"learning_rate": 1e-4, "resume": "auto", "sample_prompts": ["a"]}
    write_one(tmp_path, 10, client=CLIENT | {"global_batch": 8, "config": config})
    found, said = Checkpoints(tmp_path).find("auto"), []
    now = CLIENT | {"global_batch": 8, "config": config | {"resume": "there", "sample_prompts": ("a",)}}
    assert check_same(found, now, say=said.append) and not said
    now |= {"global_batch": 4, "config": config | {"learning_rate": 2e-4}}
    assert check_same(found, now, say=said.append)
    assert said == [
        "resuming with another option: global_batch is 8 in the checkpoint, 4 in this run",
        "resuming with another option: config.learning_rate is 0.0001 in the checkpoint, 0.0002 in this run",
    ]


def test_fingerprints_tell_weights_apart(tmp_path):
    for name, value in (("a", 0), ("b", 1), ("c", 0)):
        (tmp_path / name).mkdir()
        (tmp_path / name / "model.safetensors").write_bytes(bytes(50_000) + bytes([value]) * 50_000)
    a, b, c = (weights_fingerprint((tmp_path / name).iterdir()) for name in "abc")
    assert a == c != b
