"""train_lora.py is asked to leave: a checkpoint, one line that says how to go on, and the exit code."""

import os
import signal
import subprocess
import sys
import time

import pytest

from tests.helpers.training_run import ROOT, losses, train
from train.watching.metrics import Metrics

NO_TRIALS = ("--activation_checkpointing", "full", "--cuda_graphs", "off")


def at_step(monkeypatch: pytest.MonkeyPatch, step: int, *numbers: int) -> None:
    """Send these signals to this process in the midst of optimizer step `step`."""
    advance, count = Metrics.advance, [0]

    def and_signal(self: Metrics) -> None:
        advance(self)
        count[0] += 1
        if count[0] == step:
            for number in numbers:
                os.kill(os.getpid(), number)

    monkeypatch.setattr(Metrics, "advance", and_signal)


@pytest.mark.parametrize(
    "number,code,name",
    [
        (signal.SIGINT, 130, "Ctrl-C"),
        (signal.SIGHUP, 85, "hang-up (SIGHUP)"),
        (signal.SIGTERM, 85, "SIGTERM"),
    ],
)
def test_a_signal_saves_and_the_same_command_goes_on(
    small_model, small_data, tmp_path, monkeypatch, capfd, number, code, name
):
    whole, left = tmp_path / "whole", tmp_path / "left"
    more = ("--max_steps", "6", "--save_steps", "0", *NO_TRIALS)
    assert train(small_model, small_data, whole, *more) == 0
    with monkeypatch.context() as patch:
        at_step(patch, 2, number, number)  # the echo of a launcher is no second signal
        assert train(small_model, small_data, left, *more) == code
    said = capfd.readouterr().err
    assert f"{name}: saving a checkpoint after this step" in said
    (last,) = [line for line in said.splitlines() if "exit code" in line]
    assert (
        f"{name}: checkpoint of step " in last
        and f"exit code {code}" in last
        and "start the same command again" in last
    )
    assert len(list(left.glob("checkpoints/step-*"))) == 1 and not (left / "lora.safetensors").exists()
    assert train(small_model, small_data, left, *more) == 0
    assert losses(left) == losses(whole)


def test_a_hang_up_that_was_ignored_stays_ignored(small_model, small_data, tmp_path, monkeypatch):
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        at_step(monkeypatch, 2, signal.SIGHUP)
        assert train(small_model, small_data, tmp_path / "run", "--save_steps", "0", *NO_TRIALS) == 0
    finally:
        signal.signal(signal.SIGHUP, before)


@pytest.mark.parametrize("number,code", [(signal.SIGINT, 130), (signal.SIGTERM, 85)])
def test_before_the_first_step_there_is_nothing_to_save(
    small_model, small_data, tmp_path, monkeypatch, capfd, number, code
):
    from train.base_model import load_pipeline

    load = load_pipeline.load_pipeline

    def interrupted(*arguments, **more):
        os.kill(os.getpid(), number)
        return load(*arguments, **more)

    monkeypatch.setattr(load_pipeline, "load_pipeline", interrupted)
    assert train(small_model, small_data, tmp_path / "run", *NO_TRIALS) == code
    assert "ended outside of a step, no new checkpoint; start the same command again" in capfd.readouterr().err


def test_checkpoints_by_the_minute(small_model, small_data, tmp_path):
    """All steps are later than the first 0.06 ms; the option is no difference to a run that is resumed."""
    output = tmp_path / "run"
    more = ("--save_steps", "0", "--keep_checkpoints", "0", *NO_TRIALS)
    assert train(small_model, small_data, output, "--checkpoint_minutes", "1e-6", *more) == 0
    assert len(list(output.glob("checkpoints/step-*"))) >= 3
    other = tmp_path / "other"
    assert train(small_model, small_data, other, "--checkpoint_minutes", "0", *more) == 0
    assert len(list(other.glob("checkpoints/step-*"))) == 1 and losses(other) == losses(output)


def test_a_signal_while_data_does_not_come(small_model, small_data, tmp_path, monkeypatch, capfd):
    """A dead server, say: the wait ends after the grace, and what was trained is saved."""
    from train.data.shard_dataset import ShardDataset
    from train.process import preemption

    read, calls = ShardDataset.read, [0]

    def hangs(*arguments):
        calls[0] += 1
        if calls[0] == 3:
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(60)
        return read(*arguments)

    monkeypatch.setattr(preemption, "GRACE_SECONDS", 0.2)
    monkeypatch.setattr(ShardDataset, "read", hangs)
    began = time.monotonic()
    assert train(small_model, small_data, tmp_path / "run", "--save_steps", "0", *NO_TRIALS) == 85
    assert time.monotonic() - began < 30
    assert "SIGTERM: checkpoint of step 2 saved" in capfd.readouterr().err


def test_data_that_can_not_be_read_any_more(small_model, small_data, tmp_path, monkeypatch, capfd):
    """A server that is dead: what was trained is saved, one line says so, and the same command goes on bit-equal."""
    from train.data.remote_shards import Unreachable
    from train.data.shard_dataset import ShardDataset

    read, calls, whole, left = ShardDataset.read, [0], tmp_path / "whole", tmp_path / "left"
    assert train(small_model, small_data, whole, "--save_steps", "0", *NO_TRIALS) == 0

    def dies(*arguments):
        calls[0] += 1
        if calls[0] > 2:
            raise Unreachable("http://dead/set/000000.tar: no answer")
        return read(*arguments)

    for first in (0, 2):  # the second start has no step of its own to save
        calls[0] = first
        with monkeypatch.context() as patch:
            patch.setattr(ShardDataset, "read", dies)
            assert train(small_model, small_data, left, "--save_steps", "0", *NO_TRIALS) == 2
        said = capfd.readouterr().err
        (last,) = [line for line in said.splitlines() if line.startswith("error: ")]
        assert last.startswith("error: http://dead/set/000000.tar: no answer; ")
        assert "checkpoint of step 2 saved" in last and len(list(left.glob("checkpoints/step-*"))) == 1
        assert "start the same command again" in last and "Traceback" not in said
    assert train(small_model, small_data, left, "--save_steps", "0", *NO_TRIALS) == 0
    assert losses(left) == losses(whole)


def test_ranks_leave_when_their_launcher_is_killed(small_model, small_data, tmp_path):
    """kill -9 of torchrun: the ranks save, and are gone."""
    output = tmp_path / "run"
    flags = ["--deepspeed", str(ROOT / "ds_configs" / "zero2.json"), "--model", str(small_model)]
    flags += ["--data", str(small_data), "--output_path", str(output), "--dtype", "float32", "--lora_rank", "2"]
    flags += ["--lora_target_modules", "to_q", "--num_workers", "1", "--log_steps", "1", "--wandb_mode", "disabled"]
    flags += ["--max_steps", "100000", "--save_steps", "0", *NO_TRIALS]
    launcher = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "1", "--standalone"]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    with (tmp_path / "said").open("wb") as said:
        process = subprocess.Popen(
            [*launcher, str(ROOT / "train" / "train_lora.py"), *flags], env=environment, stdout=said, stderr=said
        )
    try:
        waited = time.monotonic() + 120
        while not (output / "metrics.jsonl").exists() or len(losses(output)) < 2:
            assert process.poll() is None and time.monotonic() < waited, (tmp_path / "said").read_text()[-3000:]
            time.sleep(0.1)
        import psutil

        ranks = psutil.Process(process.pid).children(recursive=True)
        process.kill()
        process.wait()
        _, alive = psutil.wait_procs(ranks, timeout=45)
    finally:
        process.kill()
    text = (tmp_path / "said").read_text()
    assert not alive and len(list(output.glob("checkpoints/step-*"))) == 1, text
    assert f"the launcher (process {process.pid}) has ended: checkpoint of step" in text
