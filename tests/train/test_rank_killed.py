"""kill -9 of one rank under stage 3: the others end with a reason and without help, and the same command goes on bit-equal."""

import json
import os
import random
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from demo.random_model import write_random_encoded, write_random_model

ROOT = Path(__file__).resolve().parents[2]
FLAGS = ["--dtype", "float32", "--lora_rank", "2", "--lora_target_modules", "to_q,to_k,to_v", "--num_workers", "0"]
FLAGS += ["--log_steps", "1", "--wandb_mode", "disabled", "--caption_dropout", "0.3", "--join_timeout", "40"]
A_MINUTE = 60.0


class Ranks:
    """One training of some ranks without a launcher, which would end the others: started again and again."""

    def __init__(self, folder: Path, world: int, config: str, steps: int) -> None:
        self.output, self.world, self.folder = folder / "run", world, folder
        folder.mkdir()
        self.command = [sys.executable, str(ROOT / "train" / "train_lora.py"), *FLAGS]
        self.command += ["--deepspeed", str(ROOT / "ds_configs" / f"{config}.json"), "--output_path", str(self.output)]
        self.command += ["--model", str(folder.parent / "model"), "--data", str(folder.parent / "data")]
        self.command += ["--max_steps", str(steps), "--save_steps", "1", "--keep_checkpoints", "2"]
        self.processes: list[subprocess.Popen[bytes]] = []

    def start(self) -> None:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "WORLD_SIZE": str(self.world)}
        environment |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "LOCAL_WORLD_SIZE": str(self.world)}
        environment.pop("QWEN_LORA_ATTEMPT", None)
        self.processes = []
        for rank in range(self.world):
            own = environment | {"RANK": str(rank), "LOCAL_RANK": str(rank), "LOCAL_SIZE": str(self.world)}
            with self.said(rank).open("wb") as said:
                self.processes.append(subprocess.Popen(self.command, env=own, stdout=said, stderr=said))

    def said(self, rank: int) -> Path:
        return self.folder / f"said-{rank}"

    def finish(self, seconds: float = 280) -> list[int]:
        """Exit codes, once all have ended."""
        end = time.monotonic() + seconds
        try:
            return [process.wait(timeout=max(0.1, end - time.monotonic())) for process in self.processes]
        finally:
            for process in self.processes:
                process.kill()

    def steps(self) -> dict[int, float]:
        path, found = self.output / "metrics.jsonl", {}
        for line in path.read_text().splitlines() if path.exists() else []:
            try:
                row = json.loads(line)
            except json.JSONDecodeError:  # half a line of a killed process
                continue
            if "loss" in row:
                found[row["step"]] = row["loss"]
        return found

    def wait_for(self, step: int) -> None:
        end = time.monotonic() + 250
        while max(self.steps(), default=0) < step:
            assert time.monotonic() < end and all(process.poll() is None for process in self.processes), self.last()
            time.sleep(0.02)

    def wait_until_joined(self) -> None:
        """Until the memory plan is told, which is before weights are read."""
        end = time.monotonic() + 250
        while b"memory" not in self.said(0).read_bytes():
            assert time.monotonic() < end and all(process.poll() is None for process in self.processes), self.last()
            time.sleep(0.02)

    def last(self) -> str:
        return "\n".join(self.said(rank).read_text(errors="replace")[-1500:] for rank in range(self.world))

    def kill_one(self, victim: int) -> tuple[float, list[int], str]:
        """Seconds until the others had ended by themselves, their exit codes, and the last line of one of them."""
        self.processes[victim].send_signal(signal.SIGKILL)
        began, others = time.monotonic(), [rank for rank in range(self.world) if rank != victim]
        try:
            for rank in others:
                self.processes[rank].wait(timeout=A_MINUTE)
        except subprocess.TimeoutExpired:
            pytest.fail(f"a minute after rank {victim} was killed, rank {rank} still runs: {self.last()}")
        finally:
            for process in self.processes:
                process.kill()
                process.wait()
        lines = [line for rank in others for line in self.said(rank).read_text(errors="replace").splitlines()]
        lines = [line for line in lines if line.startswith("error: ")]
        return (
            time.monotonic() - began,
            [self.processes[rank].returncode for rank in others],
            lines[-1] if lines else "",
        )

    def lora(self) -> bytes:
        """The final file's tensors, without the header (which tells the command)."""
        data = (self.output / "lora.safetensors").read_bytes()
        return data[8 + int.from_bytes(data[:8], "little") :]


def kill_and_compare(folder: Path, world: int, moments: list[tuple[str, float, int]], steps: int) -> None:
    """moments: (in which phase, seconds into it, which rank)."""
    write_random_model(folder / "model", layers=3, heads=1, text_dim=64)
    write_random_encoded(folder / "data", 12, 32, 32, prompt_tokens=6, text_dim=64, buckets=2)
    whole, killed = (Ranks(folder / name, world, "zero3", steps) for name in ("whole", "killed"))
    whole.start()
    assert whole.finish() == [0] * world, whole.last()
    expected, before = whole.steps(), 0
    for phase, moment, victim in moments:
        killed.start()
        if phase == "training":
            killed.wait_for(before + 1)
            time.sleep(moment)
        else:
            killed.wait_until_joined()
            time.sleep(moment)
        assert all(process.poll() is None for process in killed.processes), killed.last()
        seconds, codes, reason = killed.kill_one(victim)
        before = max(killed.steps(), default=0)
        print(
            f"| {phase} {moment:.2f} | {victim} | {before} | {seconds:.1f} s | {codes} | {reason[:160]} |", flush=True
        )
        assert codes == [75] * (world - 1) and reason, killed.last()
        assert all(loss == expected[step] for step, loss in killed.steps().items())
    killed.start()
    assert killed.finish() == [0] * world, killed.last()
    assert killed.steps() == expected and len(expected) == steps
    assert killed.lora() == whole.lora()


def test_two_kills(tmp_path: Path) -> None:
    kill_and_compare(tmp_path, 2, [("training", 0.05, 1), ("loading", 0.1, 0)], 40)


@pytest.mark.slow
@pytest.mark.timeout(3000)
def test_ten_kills_at_random_moments_of_loading_and_training(tmp_path: Path) -> None:
    chance = random.Random(22)
    phases = ["training"] * 7 + ["loading"] * 3
    chance.shuffle(phases)
    moments = [(phase, chance.uniform(0, 0.6), chance.randrange(2)) for phase in phases]
    kill_and_compare(tmp_path, 2, moments, 150)
