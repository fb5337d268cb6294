"""What lies where in a run folder, by name: the LoRA of its end, its checkpoints from the newest on. Reads no content.

RUN/lora.safetensors
RUN/checkpoints/step-00000500/state.safetensors     state.json beside it
RUN/checkpoints/latest                              step-00000500
"""

import re
from pathlib import Path

from files.shown import shown

FINAL = "lora.safetensors"  # the LoRA of the run's end
CHECKPOINTS, TENSORS, FACTS, LATEST = "checkpoints", "state.safetensors", "state.json", "latest"


def lora_file(path: Path) -> Path:
    """The file that holds the LoRA which `path` names: a LoRA file is itself, a checkpoint its tensors; of a run the LoRA of
    its end, or where it isn't done its newest checkpoint's tensors.

    Raises FileNotFoundError for a folder that has none of these.
    """
    if not path.is_dir():
        return path
    if (path / FINAL).is_file():
        return path / FINAL
    for folder in (path, *newest_first(path / CHECKPOINTS), *newest_first(path)):
        if (folder / FACTS).is_file() and (folder / TENSORS).is_file():
            return folder / TENSORS
    names = [found.name for found in sorted(path.glob("lora*.safetensors"), key=lambda found: found.stat().st_mtime)]
    there = f"it has {', '.join(names[-3:])}" if names else "it has no LoRA file at all"
    raise FileNotFoundError(
        f"{shown(path)} is a folder without {FINAL} and without a checkpoint, as a run that isn't done: {there}"
    )


def newest_first(root: Path) -> list[Path]:
    """The checkpoints in `root` that a run goes on from: those later than `latest` belong to one that was taken back."""
    found = step_folders(root)[::-1]
    latest = root / LATEST
    if latest.is_file():
        name = latest.read_text(errors="replace").strip()
        return [path for path in found if path.name <= name] or found
    return found


def step_folders(root: Path) -> list[Path]:
    """Checkpoint folders from the oldest to the newest; others beside them (a user's step-00000100.bak) are not ours."""
    return sorted(path for path in root.glob("step-*") if is_step(path) and path.is_dir())


def is_step(folder: Path) -> bool:
    return re.fullmatch(r"step-\d{8,}", folder.name) is not None


def step_of(folder: Path) -> int:
    return int(folder.name.removeprefix("step-"))
