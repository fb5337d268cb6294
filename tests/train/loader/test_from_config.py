"""The trainer's ways to its data, and what it does when it can't write: through train_lora.main."""

import errno
import os
import signal
import threading
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from tests.helpers.training_run import losses, train
from train.lora import lora_file
from train.watching.loss_watch import LossWatch

ROOT = Path(__file__).resolve().parents[3]


def test_remote_shards_give_the_same_training_and_fill_the_cache(small_model, small_data, tmp_path):
    assert train(small_model, small_data, tmp_path / "local", "--validation_samples", "2") == 0
    cache = ["--data_cache_path", str(tmp_path / "cache"), "--data_cache_gb", "1", "--validation_samples", "2"]
    assert train(small_model, f"file://{small_data}", tmp_path / "remote", *cache) == 0
    assert losses(tmp_path / "remote") == losses(tmp_path / "local")
    assert list((tmp_path / "cache").rglob("index.parquet")) and list((tmp_path / "cache").rglob("000000.tar"))
    none = ["--data_cache_path", str(tmp_path / "none"), "--data_cache_gb", "0", "--validation_samples", "2"]
    assert train(small_model, f"file://{small_data}", tmp_path / "uncached", *none) == 0
    assert losses(tmp_path / "uncached") == losses(tmp_path / "local")
    assert not list((tmp_path / "none").rglob("*.tar"))


@pytest.mark.parametrize("url", ["file://{}/nothing", "nosuch://bucket/set"])
def test_remote_data_that_is_not_there_is_one_line(small_model, tmp_path, capsys, url):
    code = train(small_model, url.format(tmp_path), tmp_path / "run", "--data_cache_path", str(tmp_path / "cache"))
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert code == 2 and error.startswith("error: ") and ("nosuch" in error or "holds no manifest.json" in error)


def test_webdataset_says_what_it_does_not_promise_and_resumes(small_model, small_data, tmp_path, capsys):
    more = ["--loader", "webdataset", "--save_steps", "2"]
    assert train(small_model, small_data, tmp_path / "run", *more, "--max_steps", "2") == 0
    assert "a resumed run sees other samples" in capsys.readouterr().out
    assert train(small_model, small_data, tmp_path / "run", *more) == 0
    assert "resumed from" in capsys.readouterr().out and len(losses(tmp_path / "run")) == 4
    assert train(small_model, small_data, tmp_path / "run", "--max_steps", "6") == 2  # another kind of order
    assert 'order.loader is "webdataset" in the checkpoint' in capsys.readouterr().err
    (tmp_path / "one.tar").symlink_to(small_data / "000000.tar")
    assert train(small_model, f"pipe:cat {tmp_path}/one.tar", tmp_path / "pipe", *more) == 2
    assert "no manifest.json says for which model" in capsys.readouterr().err


def test_webdataset_needs_max_steps(small_model, small_data, tmp_path, capsys):
    assert train(small_model, small_data, tmp_path / "run", "--loader", "webdataset", "--validation_samples", "2") == 2
    assert "can't hold samples out" in capsys.readouterr().err


def test_webdataset_takes_images_from_a_pipe(tiny_model, tmp_path, capsys):
    from tests.helpers.data_sets import write_set

    folder = write_set(tmp_path / "images", payload="png")
    more = ["--loader", "webdataset", "--save_steps", "0", "--max_steps", "1"]
    assert train(tiny_model, f"pipe:cat {folder}/000000.tar", tmp_path / "run", *more) == 0, capsys.readouterr().err
    assert "has no manifest.json: the memory plan takes 32×32" in capsys.readouterr().out


def test_checkpoints_at_multiples_stay(small_model, small_data, tmp_path):
    more = ["--save_steps", "1", "--keep_checkpoints", "1", "--keep_every", "2", "--max_steps", "5"]
    assert train(small_model, small_data, tmp_path / "run", *more) == 0
    kept = sorted(path.name[-1] for path in (tmp_path / "run" / "checkpoints").glob("step-*"))
    assert kept == ["2", "4", "5"]
    assert sorted(path.name for path in (tmp_path / "run").glob("lora*")) == [
        *(f"lora-{step}.safetensors" for step in (1, 2, 3, 4)),
        "lora.safetensors",
    ]
    final = load_file(tmp_path / "run" / "lora.safetensors")
    assert not all(torch.equal(t, final[n]) for n, t in load_file(tmp_path / "run" / "lora-4.safetensors").items())


@pytest.mark.parametrize(
    "policy,broken,code", [("continue", "lora-2", 0), ("stop", "lora-2", 2), ("continue", "lora.", 2)]
)
def test_a_lora_file_that_cannot_be_written(
    small_model, small_data, tmp_path, capsys, monkeypatch, policy, broken, code
):
    original, threads = lora_file.save_lora, []

    def save(path: Path, *arguments) -> None:
        threads.append(threading.current_thread().name)
        if path.name.startswith(broken):
            raise OSError(28, "No space left on device")
        original(path, *arguments)

    monkeypatch.setattr("train.saving.lora_export.save_lora", save)
    output = tmp_path / "run"
    assert train(small_model, small_data, output, "--save_steps", "1", "--on_save_error", policy) == code
    said = capsys.readouterr()
    assert "not written: No space left on device" in (said.out if code == 0 else said.err) and set(threads) == {
        "lora-export"
    }
    assert (output / "lora.safetensors").exists() == (code == 0) and (output / "lora-1.safetensors").exists()


def test_a_full_disk_leaves_no_temporary_file(tmp_path, monkeypatch):
    from train.lora.spec import LoraSpec

    def full(descriptor: int) -> None:
        assert list(tmp_path.iterdir()), "it is written beside its place"
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space left"):
        lora_file.save_lora(tmp_path / "lora.safetensors", {}, LoraSpec(("to_q",), 1, 1.0), {}, torch.float32)
    assert not list(tmp_path.iterdir())


@pytest.fixture
def at_step(monkeypatch):
    """at_step(3, do): call `do` in the midst of optimizer step 3."""
    stepped = LossWatch.stepped

    def register(step: int, do) -> None:
        def stepped_and_did(self, now: int, engine) -> None:
            if now == step:
                do()
            stepped(self, now, engine)

        monkeypatch.setattr(LossWatch, "stepped", stepped_and_did)

    return register


def test_a_row_averages_over_the_same_steps_after_a_crash(small_model, small_data, tmp_path, at_step):
    more = ["--save_steps", "2", "--log_steps", "4", "--max_steps", "6"]
    assert train(small_model, small_data, tmp_path / "whole", *more) == 0

    def crash() -> None:
        raise OSError("pulled the plug")

    at_step(4, crash)
    assert train(small_model, small_data, tmp_path / "crashed", *more) == 2
    at_step(0, crash)
    assert losses(tmp_path / "crashed") == []
    assert train(small_model, small_data, tmp_path / "crashed", *more) == 0
    assert losses(tmp_path / "crashed") == losses(tmp_path / "whole") and len(losses(tmp_path / "whole")) == 2


def test_a_run_that_saves_at_every_step_leaves_when_asked(small_model, small_data, tmp_path, at_step, capsys):
    at_step(2, lambda: os.kill(os.getpid(), signal.SIGUSR1))
    more = ["--save_steps", "0", "--checkpoint_steps", "1", "--max_steps", "9"]
    assert train(small_model, small_data, tmp_path / "run", *more) == 85
    assert "SIGUSR1: checkpoint of step 3 saved" in capsys.readouterr().err
