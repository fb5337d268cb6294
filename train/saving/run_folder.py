"""The run folder: is there room, and what made this run (config.yaml, deepspeed.json, versions.json)."""

import json
import platform
import shutil
import subprocess
import sys
from importlib import metadata
from pathlib import Path
from typing import Any

from files.atomic_files import write_file
from qwen_image.model.dtypes import DTYPES
from train.config.train_config import TrainConfig

PACKAGES = ("torch", "deepspeed", "diffusers", "transformers", "peft", "safetensors", "numpy", "pyarrow", "wandb")


def prepare_run_folder(
    config: TrainConfig,
    deepspeed_settings: dict[str, Any],
    trainable: int,
    steps: int,
    decided: dict[str, Any],
    is_main: bool = True,
) -> dict[str, Any]:
    """Create `config.output_path` and write what this start of the run is made of; returns the content of versions.json.

    Rank 0 does it, others get {}. A later start (a resumed run) overwrites.

    Args:
        trainable: parameters, and `steps`: optimizer steps of the run: what LoRA files and checkpoints will take.
        decided: options that were left open and have a value by now.

    Raises PermissionError if the folder cannot be written to and OSError if it has less room than the run will need.
    """
    if not is_main:
        return {}
    folder, needed = config.output_path, needed_bytes(config, trainable, steps)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        probe = folder / ".write_test"
        probe.touch()
        probe.unlink()
    except OSError as error:
        raise PermissionError(f"output_path: cannot write to {folder} ({error.strerror})") from None
    free = shutil.disk_usage(folder).free
    if free < needed:
        raise OSError(
            f"output_path: {folder} has {free / 1e9:.1f} GB left, the run needs {needed / 1e9:.1f} GB: "
            "free some, or save less (--keep_checkpoints, --save_steps)"
        )
    versions = collect_versions()
    write_file(folder / "config.yaml", config.to_yaml(**decided))
    write_file(folder / "deepspeed.json", json.dumps(deepspeed_settings, indent=2) + "\n")
    write_file(folder / "versions.json", json.dumps(versions, indent=2) + "\n")
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
    """What the run's LoRA files and checkpoints (weights and two moments in float32) will take on the disk."""
    files = 1 + (steps // config.save_steps if config.save_steps else 0)
    saved = steps // config.checkpoint_every if config.checkpoint_every else 1
    kept = config.keep_checkpoints + 1 + (steps // config.keep_every if config.keep_every else 0)
    checkpoints = min(saved, kept) if config.keep_checkpoints else saved
    return weights * (files * DTYPES[config.save_dtype].itemsize + max(1, checkpoints) * 3 * 4)
