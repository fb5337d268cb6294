"""What W&B and TensorBoard get: read back from what they wrote, by their own readers."""

import json
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from tests.helpers.forked_ranks import import_once, run_ranks  # noqa: F401 (a fixture)
from tests.helpers.training_run import train
from train.config import check_paths
from train.config.train_config import TrainConfig
from train.watching.metrics import Metrics


def runs(model: Path, data: Path, output: Path, steps: list[int]) -> list[int]:
    more = ["--activation_checkpointing", "full", "--cuda_graphs", "off", "--save_steps", "0", "--log_steps", "2"]
    more += ["--validation_samples", "2", "--tensorboard", "--wandb_mode", "offline", "--wandb_artifact"]
    return [train(model, data, output, *more, "--keep_best", "--max_steps", str(each)) for each in steps]


@pytest.fixture(scope="module")
def run(small_model: Path, small_data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two steps, and two more by a second start."""
    output = tmp_path_factory.mktemp("tracked") / "run"
    assert run_ranks(1, runs, small_model, small_data, output, [2, 4]) == [0, 0]
    return output


def rows(output: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]


def wandb_records(output: Path) -> list[list[Any]]:
    """The records of each offline run, in the order in which they began.

    A file of W&B is LevelDB's log: after 7 bytes of its own, blocks of 32 KiB that hold records of a checksum (4 bytes), a
    length (2) and a kind (1 whole, 2 first, 3 middle, 4 last), https://github.com/google/leveldb/blob/main/doc/log_format.md.
    """
    from wandb.proto import wandb_internal_pb2

    found = []
    for file in sorted(output.glob("wandb/offline-run-*/*.wandb")):
        data, place, piece = file.read_bytes(), 7, b""
        records: list[Any] = []
        while place < len(data):
            if (left := 32768 - place % 32768) < 7:
                place += left
                continue
            length, kind = int.from_bytes(data[place + 4 : place + 6], "little"), data[place + 6]
            piece += data[place + 7 : place + 7 + length]
            place += 7 + length
            if kind in (1, 4):
                records.append(wandb_internal_pb2.Record())
                records[-1].ParseFromString(piece)
                piece = b""
        found.append(records)
    return found


def test_the_offline_run_of_wandb(run: Path) -> None:
    """Configuration, every row, a summary, the LoRA files; a resumed training goes on under the same id."""
    starts = wandb_records(run)
    ids = {record.run.run_id for records in starts for record in records if record.HasField("run")}
    assert len(starts) == 2 and len(ids) == 1
    config = {
        item.key or item.nested_key[0]: json.loads(item.value_json)
        for record in starts[0]
        if record.HasField("run")
        for item in record.run.config.update
    }
    assert config["lora_rank"] == 2 and config["max_steps"] == 2 and config["trainable"] > 0
    logged: list[dict[str, Any]] = []
    for records in starts:
        for record in records:
            if record.HasField("history"):
                items = {(item.key or "/".join(item.nested_key)): item.value_json for item in record.history.item}
                logged.append({name: json.loads(value) for name, value in items.items()})
    of_file = [row for row in rows(run) if "start" not in row]
    of_wandb = [{n: v for n, v in row.items() if n[0] != "_"} for row in logged if "start/python" not in row]
    assert of_wandb == of_file and any("update_norm/attention_image" in row for row in of_wandb)
    summary = {
        item.key or item.nested_key[0]: json.loads(item.value_json)
        for record in starts[1]
        if record.HasField("summary")
        for item in record.summary.update
    }
    assert summary["exit_code"] == 0 and summary["steps"] == 4 and summary["best_step"] in (2, 4)
    files = [
        entry.path
        for record in starts[1]
        if record.HasField("request") or record.HasField("artifact")
        for entry in record.artifact.manifest.contents
    ]
    assert sorted(files) == ["lora-best.safetensors", "lora.safetensors"]


def test_the_events_of_tensorboard(run: Path) -> None:
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(run / "tensorboard"), size_guidance={"scalars": 0})
    events.Reload()
    expected: dict[str, list[tuple[int, float]]] = {}
    for row in rows(run):
        for name, value in row.items():
            if name not in ("step", "start", "compiler"):
                expected.setdefault(name, []).append((row["step"], value))
    assert set(events.Tags()["scalars"]) == set(expected)
    for name, points in expected.items():
        found = [(event.step, event.value) for event in events.Scalars(name)]
        assert found == [(step, pytest.approx(value, rel=1e-6)) for step, value in points], name


def test_images_and_a_step_that_is_trained_again(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    options: dict[str, Any] = {
        "model": "owner/model",
        "data": "shards",
        "deepspeed": "z.json",
        "wandb_mode": "disabled",
    }
    config = TrainConfig(**options, output_path=tmp_path, tensorboard=True)
    Image.new("RGB", (40, 20), "red").save(tmp_path / "sheet.png")
    metrics = Metrics.from_config(config, 9, 1)
    metrics.images(3, tmp_path / "sheet.png", [(tmp_path / "sheet.png", "a fox")])
    for step in (3, 6):
        metrics.record(step, loss=float(step))
    metrics.close()
    metrics = Metrics.from_config(config, 9, 1, start_step=3)
    metrics.record(6, loss=7.0)
    metrics.close()
    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    assert [(event.step, event.value) for event in events.Scalars("loss")] == [(3, 3.0), (6, 7.0)]
    (image,) = events.Images("samples")
    assert (image.step, image.width, image.height) == (3, 40, 20)


def test_without_the_package(
    monkeypatch: pytest.MonkeyPatch, small_model: Path, small_data: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    monkeypatch.setattr(check_paths, "find_spec", lambda name: None)
    assert train(small_model, small_data, tmp_path / "run", "--tensorboard") == 2
    assert "tensorboard: the package is missing: pip install tensorboard" in capsys.readouterr().err
