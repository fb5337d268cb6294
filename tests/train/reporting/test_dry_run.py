"""--dry_run: tells what the run then does, refuses what the run would refuse, and leaves no trace."""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from tests.helpers.data_sets import write_set
from tests.helpers.training_run import ROOT, train

SAMPLED = ("--sample_prompts", "a cat", "--sample_steps", "2")


def traces(folder: Path) -> dict[str, tuple[int, int]]:
    """Every file and folder with its size and time of change."""
    every = [folder, *folder.rglob("*")]
    return {str(path): (path.lstat().st_size, path.lstat().st_mtime_ns) for path in every}


def test_a_dry_run_tells_what_the_run_does_and_writes_nothing(
    small_model: Path, small_data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    flags = (
        "--validation_samples",
        "2",
        "--save_steps",
        "2",
        "--batch_size",
        "2",
        "--lora_target_modules",
        "attention,mlp",
    )
    before = [traces(folder) for folder in (tmp_path, small_model, small_data)]
    assert train(small_model, small_data, tmp_path / "new" / "run", *flags, "--dry_run") == 0
    assert before == [traces(folder) for folder in (tmp_path, small_model, small_data)]
    told = capsys.readouterr().out
    assert "12 samples, 2 held out in 1 shards" in told and "latents and prompt embeddings" in told
    assert sum(map(int, re.findall(r"(\d+) micro-batches an epoch", told))) == int(
        re.findall(r"(\d+) micro-batches of 2 an epoch", told)[0]
    )
    assert "4 steps of 2 samples (1 ranks × 1 accumulated × 2)" in told and "memory in each rank: base" in told
    assert "time: unknown" in told and "download: nothing of the model" in told and "run folder:" in told
    assert "lora.safetensors and 1 of earlier steps, each of" in told and told.splitlines()[-1].startswith(
        "done: nothing"
    )
    trainable = [
        int(text.replace(",", "")) for text in re.findall(r"([\d,]+) (?:trainable )?parameters$", told, re.MULTILINE)
    ]
    assert trainable[0] == sum(trainable[1:])

    assert train(small_model, small_data, tmp_path / "run", *flags) == 0
    start = json.loads((tmp_path / "run" / "events.jsonl").read_text().splitlines()[0])["facts"]
    assert start["lora"]["trainable"] == trainable[0] and start["steps"] == 4
    size = (tmp_path / "run" / "lora.safetensors").stat().st_size
    assert abs(size - 4 * trainable[0]) < 20_000  # the header


def test_a_dry_run_of_a_run_that_goes_on_or_is_done(
    small_model: Path, small_data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "run"
    assert train(small_model, small_data, run, "--save_steps", "4") == 0
    before = traces(tmp_path)
    capsys.readouterr()
    assert train(small_model, small_data, run, "--dry_run") == 0
    assert "already done: LoRA of step 4" in capsys.readouterr().out
    assert train(small_model, small_data, run, "--max_steps", "10", "--dry_run") == 0
    told = capsys.readouterr().out
    assert "goes on from the checkpoint of step 4: 6 steps are left" in told
    assert re.search(r"time: about .* of start \(.* s a step; as run on the same hardware\)", told)
    assert train(small_model, small_data, run, "--lora_rank", "3", "--dry_run") == 2  # as the run would be
    assert traces(tmp_path) == before


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (("--batch_size", "100000", "--tail", "drop"), "fill no micro-batch"),
        (("--lora_target_modules", "nothing"), "no linear layer is called"),
        (("--lora_checkpoint", "gone.safetensors"), "no file at gone"),
    ],
)
def test_what_is_refused_is_refused_dry_too(
    small_model: Path,
    small_data: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    flags: tuple[str, ...],
    message: str,
) -> None:
    assert train(small_model, small_data, tmp_path / "run", *flags, "--dry_run") == 2
    assert message in capsys.readouterr().err and not (tmp_path / "run").exists()


def test_a_disk_that_is_too_small(
    small_model: Path,
    small_data: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr("shutil.disk_usage", lambda path: SimpleNamespace(free=100))
    monkeypatch.setattr("train.process.node_health.LEAST_TEMPORARY_BYTES", 0)
    assert train(small_model, small_data, tmp_path / "run", "--dry_run") == 2
    assert "has 100 B left" in capsys.readouterr().err


def test_plain_shards_get_no_index_and_remote_ones_no_cache(
    small_model: Path, small_data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    plain = tmp_path / "plain"
    plain.mkdir()
    shutil.copy(write_set(tmp_path / "images", payload="png") / "000000.tar", plain)
    before = traces(tmp_path)
    assert (
        train(
            small_model, f"file://{small_data}", tmp_path / "run", "--data_cache_path", str(tmp_path / "c"), "--dry_run"
        )
        == 0
    )
    told = capsys.readouterr().out
    assert re.search(r"download: shards of .* from file:.*, up to .* kept in the cache", told)
    # the model has no encoders for images: refused, as the run would be, after the shards were looked at
    assert train(small_model, plain, tmp_path / "run", "--dry_run") == 2
    assert "scanning its shards once" in capsys.readouterr().out
    assert traces(tmp_path) == before


def test_a_model_of_the_hub_is_not_fetched_but_its_files_are_named(
    small_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    files = {"model_index.json": 500, "transformer/a.safetensors": 40_000_000_000, "vae/b.safetensors": 254_000_000}
    files |= {"README.md": 1, "text_encoder/c.safetensors": 16_600_000_000}
    siblings = [SimpleNamespace(rfilename=name, size=size) for name, size in files.items()]
    found = SimpleNamespace(siblings=siblings, sha="0" * 40)
    monkeypatch.setattr("huggingface_hub.HfApi.model_info", lambda *_, **__: found)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    assert train(Path("Qwen/Qwen-Image"), small_data, tmp_path / "run", "--dry_run") == 0
    told = capsys.readouterr().out
    assert "download: 40 GB of Qwen/Qwen-Image, in 2 files" in told and "40 GB  transformer/a.safetensors" in told
    assert "on 60 layers" in told and "20.4 billion parameters" in told and "  80 GiB: fits" in told
    assert train(Path("Qwen/Qwen-Image"), small_data, tmp_path / "run", "--dry_run", "--sample_prompts", "a cat") == 0
    assert "download: 56.9 GB of Qwen/Qwen-Image, in 4 files" in capsys.readouterr().out
    assert list(tmp_path.iterdir()) == []


def test_a_hub_that_cannot_be_asked_is_told(
    small_data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert train(Path("Qwen/Qwen-Image"), small_data, tmp_path / "run", "--dry_run") == 0
    told = capsys.readouterr().out
    assert "download: Qwen/Qwen-Image: the hub can't be asked for its files: " in told


def test_two_ranks_tell_once(small_model: Path, small_data: Path, tmp_path: Path) -> None:
    flags = [
        "--deepspeed",
        str(ROOT / "ds_configs" / "zero3.json"),
        "--model",
        str(small_model),
        "--data",
        str(small_data),
    ]
    flags += ["--output_path", str(tmp_path / "run"), "--max_steps", "4", "--num_workers", "0", "--dtype", "float32"]
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    done = subprocess.run(
        [*launcher, str(ROOT / "train" / "train_lora.py"), *flags, "--dry_run"],
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=250,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.count("dry run: no weights") == done.stdout.count("done: nothing was written") == 1
    assert "4 steps of 2 samples (2 ranks × 1 accumulated × 1)" in done.stdout
    assert not (tmp_path / "run").exists()
