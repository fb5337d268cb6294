"""The disk of the run folder fills up in the midst of training: a real one (a small tmpfs), through train_lora.main."""

import json
import os
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.helpers.training_run import losses, train
from train.config.train_config import TrainConfig
from train.saving import checkpoint_folder
from train.saving.checkpoints import Checkpoints
from train.watching.loss_watch import LossWatch
from train.watching.metrics import Metrics

STEPS = ["--max_steps", "5", "--save_steps", "1", "--keep_checkpoints", "0"]


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Path]:
    folder = tmp_path / "disk"
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=80m", "tmpfs", str(folder)]
    if os.geteuid() != 0 or subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("no permission to mount a tmpfs")
    yield folder
    # Lazily: a run that ended with an exception leaves files open until its traceback is collected.
    subprocess.run(["umount", "--lazy", str(folder)], check=True)


def fill(path: Path) -> None:
    with path.open("wb", buffering=0) as file:
        for block in (1 << 20, 1 << 12, 1):
            try:
                while file.write(bytes(block)) == block:
                    pass
            except OSError:
                continue


def fill_and_free(monkeypatch: pytest.MonkeyPatch, filler: Path, full_from: int, free_from: int) -> None:
    """No byte is left on the disk from one optimizer step to another."""
    stepped = LossWatch.stepped

    def stepped_and_filled(self: LossWatch, step: int, engine: object) -> None:
        if step == full_from:
            fill(filler)
        if step == free_from:
            filler.unlink()
        stepped(self, step, engine)

    monkeypatch.setattr(LossWatch, "stepped", stepped_and_filled)


def saved(output: Path) -> tuple[list[int], list[str]]:
    """Steps of the checkpoints, names of the LoRA files; nothing half-written lies about."""
    assert not [path for path in output.rglob("*") if path.name.startswith(".partial-step") or path.suffix == ".tmp"]
    steps = [int(path.name[-8:]) for path in checkpoint_folder.step_folders(output / "checkpoints")]
    return steps, sorted(path.name for path in output.glob("lora*"))


def final(output: Path) -> bytes:
    content = (output / "lora.safetensors").read_bytes()
    return content[8 + int.from_bytes(content[:8], "little") :]


@pytest.mark.parametrize("looks_first", [True, False], ids=["looks for room", "runs into the end"])
def test_a_full_disk_is_passed_over_or_stops_by_policy(
    small_model, small_data, tmp_path, disk, capsys, monkeypatch, looks_first
):
    assert train(small_model, small_data, tmp_path / "whole", *STEPS) == 0
    if not looks_first:
        monkeypatch.setattr(checkpoint_folder, "SPARE_BYTES", -(1 << 40))
    with monkeypatch.context() as patch:
        fill_and_free(patch, disk / "filler", 2, 4)
        assert train(small_model, small_data, disk / "going on", *STEPS, "--on_save_error", "continue") == 0
        said = capsys.readouterr()
        for step in (2, 3):
            assert f"step-{step:08d} not written: " in said.out and f"lora-{step}.safetensors not written: " in said.out
        assert "training goes on" in said.out
        assert saved(disk / "going on") == (
            [1, 4, 5],
            ["lora-1.safetensors", "lora-4.safetensors", "lora.safetensors"],
        )
        assert losses(disk / "going on") == losses(tmp_path / "whole") and len(losses(tmp_path / "whole")) == 5

        assert train(small_model, small_data, disk / "stops", *STEPS, "--on_save_error", "stop") == 2
        error = capsys.readouterr().err.strip().splitlines()[-1]
        assert error.startswith("error: ") and "not written: " in error and "Errno" not in error
    (disk / "filler").unlink()
    assert saved(disk / "stops") == ([1], ["lora-1.safetensors"])
    assert Checkpoints(disk / "stops").find("auto").step == 1
    assert train(small_model, small_data, disk / "stops", *STEPS, "--on_save_error", "stop") == 0
    assert losses(disk / "stops") == losses(tmp_path / "whole") and final(disk / "stops") == final(tmp_path / "whole")
    assert saved(disk / "stops")[0] == [1, 2, 3, 4, 5]


def test_rows_of_metrics_wait_for_room(disk, tmp_path, capsys):
    settings = {"model": "m", "data": "d", "deepspeed": "ds.json", "wandb_mode": "disabled"}
    metrics = Metrics.from_config(
        TrainConfig(output_path=disk / "run", **settings), total_steps=400, samples_per_step=1
    )
    for step in range(1, 401):
        if step == 100:
            fill(disk / "filler")
        if step == 300:
            (disk / "filler").unlink()
        metrics.record(step, loss=0.1 * step)
    metrics.close()
    rows = [json.loads(line) for line in (disk / "run" / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == list(range(1, 401))
    assert capsys.readouterr().err.count("metrics.jsonl can't be written (No space left on device)") == 1


def test_a_full_disk_at_start_is_one_line(small_model, small_data, disk, capsys):
    fill(disk / "filler")
    assert train(small_model, small_data, disk / "run", *STEPS) == 2
    assert capsys.readouterr().err.strip().splitlines()[-1].startswith("error: output_path: ")
