"""The run folder: is there room; what made this run (config.yaml, deepspeed.json, versions.json)."""

import json
import platform
import shutil
import subprocess
import sys
import tempfile
from importlib import metadata
from pathlib import Path
from typing import Any

from files.atomic_files import write_file
from files.shown import shown, shown_bytes
from qwen_image.model.dtypes import DTYPES
from train.config.train_config import TrainConfig
from train.engine.optimizer import Optimizer

PACKAGES = ("torch", "deepspeed", "diffusers", "transformers", "peft", "safetensors", "numpy", "pyarrow", "wandb")


def check_room(config: TrainConfig, trainable: int, steps: int) -> int:
    """The bytes that the run will save, if its folder can be written to and has room for them. Leaves nothing behind.

    Args:
        trainable: parameters, and `steps`: optimizer steps of the run: what LoRA files and checkpoints will take.

    Raises PermissionError if the folder cannot be written to and OSError if it has less room than the run will need.
    """
    folder, needed = config.output_path, needed_bytes(config, trainable, steps)
    nearest = next(path for path in (folder, *folder.absolute().parents) if path.exists())
    try:
        with tempfile.TemporaryFile(dir=nearest):
            pass
        free = shutil.disk_usage(nearest).free
    except OSError as error:
        raise PermissionError(f"output_path: cannot write to {shown(nearest)} ({error.strerror})") from None
    if free < needed:
        raise OSError(
            f"output_path: {shown(folder)} has {shown_bytes(free)} left, the run needs {shown_bytes(needed)}: "
            "free some, or save less (--keep_checkpoints, --save_steps)"
        )
    return needed


def prepare_run_folder(
    config: TrainConfig, deepspeed_settings: dict[str, Any], decided: dict[str, Any], is_main: bool = True
) -> dict[str, Any]:
    """Create `config.output_path` and write what this start of the run is made of; returns the content of versions.json.

    Comes when everything that can be refused was: a later start (a resumed run) overwrites. Rank 0 does it, others get {}.

    Args:
        decided: options that were left open and have a value by now.
    """
    if not is_main:
        return {}
    folder, versions = config.output_path, collect_versions()
    try:
        folder.mkdir(parents=True, exist_ok=True)
        write_file(folder / "config.yaml", config.to_yaml(**decided))
        write_file(folder / "deepspeed.json", json.dumps(deepspeed_settings, indent=2) + "\n")
        write_file(folder / "versions.json", json.dumps(versions, indent=2) + "\n")
    except OSError as error:
        raise OSError(f"output_path: cannot write to {shown(folder)} ({error.strerror})") from None
    return versions


def collect_versions() -> dict[str, Any]:
    """Python, packages, this project's git commit ("-dirty" with uncommitted changes, None outside git), the command."""
    versions: dict[str, Any] = {"python": platform.python_version(), "platform": platform.platform()}
    for package in PACKAGES:
        try:
            versions[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            versions[package] = None
    versions["git_commit"] = git_commit(Path(__file__).parent)
    versions["command"] = sys.argv
    return versions


def git_commit(folder: Path) -> str | None:
    """The commit that `folder` is at, with "-dirty" if tracked files differ from it; None without git."""

    def git(*words: str) -> str:
        command = ["git", "-C", str(folder), *words]
        return subprocess.run(command, capture_output=True, text=True, timeout=20, check=True).stdout.strip()

    try:
        return git("rev-parse", "HEAD") + ("-dirty" if git("status", "--porcelain", "--untracked-files=no") else "")
    except (OSError, subprocess.SubprocessError):
        return None


def needed_bytes(config: TrainConfig, weights: int, steps: int) -> int:
    """What the run's LoRA files and checkpoints (weights, average, optimizer state in float32) will take on the disk."""
    averages = config.ema_decay is not None
    files = (1 + (steps // config.save_steps if config.save_steps else 0)) * (1 + averages) + config.keep_best
    saved = steps // config.checkpoint_every if config.checkpoint_every else 1
    kept = config.keep_checkpoints + 1 + (steps // config.keep_every if config.keep_every else 0)
    checkpoints = min(saved, kept) if config.keep_checkpoints else saved
    numbers = max(1, checkpoints) * (Optimizer.from_config(config).saved_tensors + averages)
    return weights * (files * DTYPES[config.save_dtype].itemsize + numbers * 4)
