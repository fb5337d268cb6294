"""train_lora.py as a process: killed, asked to leave, its newest checkpoint damaged; the result is always the same bits."""

import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
FLAGS = ["--dtype", "float32", "--lora_rank", "2", "--lora_target_modules", "to_q", "--num_workers", "1"]
FLAGS += ["--log_steps", "1", "--wandb_mode", "disabled", "--caption_dropout", "0.3", "--lora_dropout", "0.1"]


class Run:
    """One training that is started again and again with the same command."""

    def __init__(self, model: Path, data: Path, output: Path, config: str = "zero2", *more: str) -> None:
        self.output = output
        script = [sys.executable, str(ROOT / "train" / "train_lora.py")]
        deepspeed = ["--deepspeed", str(ROOT / "ds_configs" / f"{config}.json")]
        paths = ["--model", str(model), "--data", str(data), "--output_path", str(output)]
        self.command = [*script, *deepspeed, *paths, *FLAGS, *more]

    def start(self) -> "subprocess.Popen[str]":
        """In a process group of its own, so that a kill takes the loader's workers along."""
        environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
        return subprocess.Popen(
            self.command,
            env=environment,
            start_new_session=True,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )

    def finish(self) -> tuple[int, str]:
        process = self.start()
        said, _ = process.communicate(timeout=300)
        return process.returncode, said

    def steps(self) -> dict[int, float]:
        """step → loss of metrics.jsonl; a killed process may leave half a line."""
        path = self.output / "metrics.jsonl"
        rows = []
        for line in path.read_text().splitlines() if path.exists() else []:
            try:
                rows.append(json.loads(line))
            except json.JSONDecodeError:
                continue
        return {row["step"]: row["loss"] for row in rows if "loss" in row}

    def wait_for(self, process: "subprocess.Popen[str]", step: int) -> None:
        """Until `step` is in metrics.jsonl or the process has ended."""
        started = time.monotonic()
        while process.poll() is None and max(self.steps(), default=0) < step:
            assert time.monotonic() - started < 120, process.kill()
            time.sleep(0.01)

    def lora(self) -> bytes:
        """The final file's tensors as bytes, without the header (which tells the command)."""
        data = (self.output / "lora.safetensors").read_bytes()
        return data[8 + int.from_bytes(data[:8], "little") :]


def test_asked_to_leave_then_damaged_equals_uninterrupted(small_model: Path, small_data: Path, tmp_path: Path) -> None:
    more = ["--max_steps", "60", "--save_steps", "2", "--keep_checkpoints", "3"]
    whole, left = (Run(small_model, small_data, tmp_path / name, "zero2", *more) for name in ("whole", "left"))
    assert whole.finish()[0] == 0
    process = left.start()
    left.wait_for(process, 5)
    os.kill(process.pid, signal.SIGUSR1)
    said, _ = process.communicate(timeout=120)
    assert process.returncode == 85 and "exit code 85" in said, said
    stopped = max(left.steps())
    assert stopped < 60 and (left.output / "checkpoints" / f"step-{stopped:08d}").is_dir()
    newest, before = sorted((left.output / "checkpoints").glob("step-*"))[:-3:-1]
    state = newest / "state.safetensors"
    os.truncate(state, state.stat().st_size // 2)
    code, said = left.finish()
    assert code == 0 and f"{newest} is damaged" in said and f"resumed from {before}" in said, said
    assert left.steps() == whole.steps() and len(whole.steps()) == 60
    assert left.lora() == whole.lora()


def test_a_lokr_that_was_killed_equals_an_uninterrupted_one(
    small_model: Path, small_data: Path, tmp_path: Path
) -> None:
    more = [
        "--max_steps",
        "40",
        "--save_steps",
        "2",
        "--lora_type",
        "lokr",
        "--lokr_factor",
        "4",
        "--lora_dropout",
        "0",
    ]
    whole, killed = (Run(small_model, small_data, tmp_path / name, "zero2", *more) for name in ("whole", "killed"))
    assert whole.finish()[0] == 0
    process = killed.start()
    killed.wait_for(process, 7)
    assert process.poll() is None, process.communicate()[0]
    os.killpg(process.pid, signal.SIGKILL)
    process.communicate()
    code, said = killed.finish()
    assert code == 0 and "resumed from" in said, said
    assert killed.steps() == whole.steps() and len(whole.steps()) == 40
    assert killed.lora() == whole.lora()


OPTIMIZERS = {
    "schedulefree": ["--optimizer", "schedulefree", "--learning_rate", "1e-2"],
    "prodigy": ["--optimizer", "prodigy", "--optimizer_args", "d0=1e-3", "--lr_scheduler", "cosine"],
    "muon": ["--optimizer", "muon", "--learning_rate", "1e-3", "--ema_decay", "0.9"],
    "adafactor": ["--optimizer", "adafactor"],
    "lora+": ["--lora_plus_ratio", "8"],
}


@pytest.mark.slow
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_killed_under_another_optimizer_equals_uninterrupted(
    small_model: Path, small_data: Path, tmp_path: Path, name: str
) -> None:
    more = ["--max_steps", "40", "--save_steps", "1", "--keep_checkpoints", "2", *OPTIMIZERS[name]]
    whole, killed = (Run(small_model, small_data, tmp_path / n, "zero2", *more) for n in ("whole", "killed"))
    assert whole.finish()[0] == 0
    chance = random.Random(name)
    for _ in range(2):
        process = killed.start()
        killed.wait_for(process, max(killed.steps(), default=0) + 3)
        time.sleep(chance.uniform(0, 0.2))
        assert process.poll() is None, process.communicate()[0]
        os.killpg(process.pid, signal.SIGKILL)
        process.communicate()
    code, said = killed.finish()
    assert code == 0 and "resumed from" in said, said
    assert killed.steps() == whole.steps() and len(whole.steps()) == 40
    assert killed.lora() == whole.lora()


@pytest.mark.slow
@pytest.mark.parametrize("config,kills", [("zero2", 20), ("zero3", 20)])
def test_killed_at_random_moments_equals_uninterrupted(
    small_model: Path, small_data: Path, tmp_path: Path, config: str, kills: int
) -> None:
    steps = 20 * kills
    more = ["--max_steps", str(steps), "--save_steps", "1", "--keep_checkpoints", "2"]
    whole, killed = (Run(small_model, small_data, tmp_path / name, config, *more) for name in ("whole", "killed"))
    assert whole.finish()[0] == 0
    expected, chance = whole.steps(), random.Random(config)
    seen: dict[int, float] = {}
    stops: list[int] = []
    while len(stops) < kills:
        process = killed.start()
        killed.wait_for(process, max(killed.steps(), default=0) + 1)
        time.sleep(chance.uniform(0, 0.3))  # in the midst of steps, of writing and of renaming
        assert process.poll() is None, process.communicate()[0]
        os.killpg(process.pid, signal.SIGKILL)
        process.communicate()
        for step, loss in killed.steps().items():
            assert seen.setdefault(step, loss) == loss == expected[step], f"step {step}"
        stops.append(max(seen))
    code, said = killed.finish()
    assert code == 0, said
    print(f"{config}: killed {kills} times, after steps {stops}, of {steps}")
    assert killed.steps() == expected and len(expected) == steps
    assert killed.lora() == whole.lora()
    for step in range(1, steps):
        assert (killed.output / f"lora-{step}.safetensors").is_file(), step
