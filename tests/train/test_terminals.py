"""Terminals and pipes that go while train_lora.py runs: the run and its exit code don't go with them."""

import contextlib
import fcntl
import os
import pty
import subprocess
import sys
import termios
import time

import pytest

from files.shown import Forgiving
from tests.helpers.training_run import ROOT, losses


@pytest.fixture
def start(small_model, small_data, tmp_path):
    """Start a run as a process; returns it and its folder."""
    flags = ["--deepspeed", str(ROOT / "ds_configs" / "zero2.json"), "--model", str(small_model)]
    flags += [
        "--data",
        str(small_data),
        "--output_path",
        str(tmp_path / "run"),
        "--dtype",
        "float32",
        "--lora_rank",
        "2",
    ]
    flags += ["--lora_target_modules", "to_q", "--num_workers", "1", "--log_steps", "1", "--wandb_mode", "disabled"]
    flags += ["--save_steps", "0", "--activation_checkpointing", "full", "--cuda_graphs", "off"]
    command = [sys.executable, str(ROOT / "train" / "train_lora.py"), *flags]
    started = []

    def begin(*more, **options):
        environment = os.environ | {"PYTHONPATH": str(ROOT)}
        started.append(subprocess.Popen([*command, *more], env=environment, **options))
        return started[0], tmp_path / "run"

    yield begin
    for process in started:
        process.kill()
        process.wait()


def test_a_terminal_that_is_closed(start):
    """SIGHUP comes, and the progress bar has nowhere to go: the checkpoint is saved all the same."""
    terminal, side = pty.openpty()

    def take_it() -> None:
        os.setsid()
        fcntl.ioctl(0, termios.TIOCSCTTY, 0)

    process, run = start("--max_steps", "100000", stdin=side, stdout=side, stderr=side, preexec_fn=take_it)
    os.close(side)

    os.set_blocking(terminal, False)
    end = time.monotonic() + 150
    while not (run / "metrics.jsonl").exists() or len(losses(run)) < 2:
        assert process.poll() is None and time.monotonic() < end
        with contextlib.suppress(BlockingIOError):
            os.read(terminal, 1 << 16)
        time.sleep(0.02)
    os.close(terminal)
    assert process.wait(60) == 85
    assert len(list(run.glob("checkpoints/step-*"))) == 1


def test_readers_that_go(start):
    """As `train_lora.py 2>&1 | head -1`."""
    mine, theirs = os.pipe()
    os.close(mine)
    process, run = start("--max_steps", "3", stdout=theirs, stderr=theirs)
    os.close(theirs)
    assert process.wait(150) == 0
    assert (run / "lora.safetensors").is_file() and len(losses(run)) == 3


def test_streams_that_are_closed(small_model, small_data, tmp_path):
    """As `train_lora.py <&- >&- 2>&-`: nothing is said, and no file gets the number of a stream that is written to."""
    flags = "--deepspeed zero2.json --dtype float32 --lora_rank 2 --lora_target_modules to_q --wandb_mode disabled"
    flags += f" --activation_checkpointing full --max_steps 3 --log_steps 1 --model {small_model} --data {small_data}"
    command = f"{sys.executable} {ROOT}/train/train_lora.py {flags} --output_path {tmp_path}/run <&- >&- 2>&-"
    done = subprocess.run(["sh", "-c", command], env=os.environ | {"PYTHONPATH": str(ROOT)}, timeout=240)
    assert done.returncode == 0 and len(losses(tmp_path / "run")) == 3


def test_forgiving():
    class Gone:
        encoding = "utf-8"

        def write(self, text: str) -> int:
            raise BrokenPipeError

        flush = write

    stream = Forgiving(Gone())
    assert stream.write("abc") == 3 and stream.encoding == "utf-8"
    print("line", file=stream)
