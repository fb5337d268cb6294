"""One checkpoint on disk: write it whole or not at all, verify and read it, find the newest, remove old ones.

    checkpoints/
        step-00000500/state.safetensors     weight/NAME, exp_avg/NAME, exp_avg_sq/NAME …: float32, whole
        step-00000500/state.json            step, the optimizer's counters, the client's state, sha256 of both files
        latest                              step-00000500

A checkpoint is written under a temporary name, flushed to the disk, then renamed: whatever happens, the ones that exist
stay as they are. No torch.distributed here.
"""

import errno
import hashlib
import json
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from itertools import chain
from pathlib import Path
from typing import Any

import torch

from files.atomic_files import PARTIAL, whole_file, whole_folder, write_file
from files.folder_lock import require_owned
from qwen_image.loading.safetensors_writer import data_bytes, safetensors_blocks
from train.config.run_files import CHECKPOINTS, FACTS, LATEST, TENSORS, is_step, newest_first, step_folders, step_of

FORMAT_VERSION = 1
SPARE_BYTES = 64 << 20  # left free on the disk, for metrics and the like
Say = Callable[[str], None]


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint whose checksums were verified."""

    path: Path
    step: int
    counters: dict[str, float]
    kinds: list[str]
    shapes: dict[str, tuple[int, ...]]
    client: dict[str, Any]  # whatever `save` was given: JSON
    groups: list[dict[str, float]] = field(default_factory=list)  # train/engine/whole_state.py


# ── writing ─────────────────────────────────────────────────────────────────────────────────────────────────────────────


def write_checkpoint(
    folder: Path,
    facts: dict[str, Any],
    wholes: Iterable[torch.Tensor | None],
    others: Mapping[str, torch.Tensor] | None = None,
) -> None:
    """Write one checkpoint folder, durably, all or nothing.

    `wholes` gives a float32 [total] for each of facts["kinds"]; `others`: more tensors, with shapes of their own.
    """
    root = folder.parent
    require_owned(folder)  # what is removed below may be a successor's
    root.mkdir(parents=True, exist_ok=True)
    for left_over in root.glob(f"{PARTIAL}*"):  # of a process that was killed while saving, on whichever host
        if left_over.is_dir():
            shutil.rmtree(left_over, ignore_errors=True)
        else:
            left_over.unlink(missing_ok=True)
    what = facts["kinds"], facts["shapes"], wholes
    with whole_folder(folder) as partial:  # replaces a step that is trained again after going back to an earlier one
        facts = facts | {"sha256": write_tensors(partial / TENSORS, *what, others or {})}
        write_file(partial / FACTS, facts_bytes(facts))
    write_file(root / LATEST, f"{folder.name}\n")


def write_tensors(
    path: Path,
    kinds: list[str],
    shapes: dict[str, list[int]],
    wholes: Iterable[torch.Tensor | None],
    others: Mapping[str, torch.Tensor],
) -> str:
    """Write a safetensors file kind by kind, as they arrive, then the `others`; returns its sha256."""
    layout = {f"{kind}/{name}": (torch.float32, shape) for kind in kinds for name, shape in shapes.items()}
    assert all(value.dtype == torch.float32 for value in others.values()), "optimizer state must be float32"
    layout |= {key: (torch.float32, list(value.shape)) for key, value in others.items()}
    size, free = data_bytes(layout), shutil.disk_usage(path.parent).free
    if free < size + SPARE_BYTES:
        raise OSError(
            errno.ENOSPC,
            f"it needs {size / 2**20:.1f} MiB and {SPARE_BYTES >> 20} MiB to spare, {free / 2**20:.1f} MiB are free",
        )
    digest = hashlib.sha256()
    with whole_file(path) as file:
        for block in safetensors_blocks(layout, chain(only_rank_0s(wholes), others.values()), {"format": "pt"}):
            file.write(block)
            digest.update(block)
    return digest.hexdigest()


def only_rank_0s(wholes: Iterable[torch.Tensor | None]) -> Iterator[torch.Tensor]:
    for whole in wholes:
        assert whole is not None, "only rank 0 writes"
        yield whole


def prune(newest: Path, keep: int, keep_every: int, say: Say) -> None:
    """Remove all but the last `keep` checkpoints up to `newest`, except those at multiples of `keep_every` steps.

    Later ones (of a run that was taken back to an earlier checkpoint) are left alone.
    """
    if keep == 0:
        return
    old = [path for path in step_folders(newest.parent) if path.name < newest.name]
    for path in old[: max(0, len(old) - (keep - 1))]:
        if keep_every == 0 or step_of(path) % keep_every != 0:
            try:
                shutil.rmtree(path)
            except OSError as error:
                say(f"old checkpoint {path} not removed: {error.strerror}")


# ── reading ─────────────────────────────────────────────────────────────────────────────────────────────────────────────


def newest_whole(path: Path, may_be_missing: bool, say: Say) -> Checkpoint | None:
    """The newest undamaged checkpoint at `path`: a run, a folder of checkpoints, or one checkpoint."""
    root = path if step_folders(path) else path / CHECKPOINTS
    candidates = newest_first(root)
    if not candidates and ((path / FACTS).exists() or (is_step(path) and not may_be_missing)):
        return read_checkpoint(path)
    if not candidates:
        if may_be_missing:
            return None
        raise FileNotFoundError(f"no checkpoint in {path}")
    for candidate in candidates:
        try:
            return read_checkpoint(candidate)
        except (ValueError, OSError) as error:
            say(f"{error}; trying the one before")
    raise ValueError(f"all {len(candidates)} checkpoints in {root} are damaged; --resume never starts anew")


def read_checkpoint(folder: Path) -> Checkpoint:
    """Read and verify one checkpoint. Raises FileNotFoundError, or ValueError saying what is damaged."""
    for name in (FACTS, TENSORS):
        if not (folder / name).is_file():
            raise FileNotFoundError(f"checkpoint {folder} has no {name}")
    try:
        facts = json.loads((folder / FACTS).read_bytes())
        if facts_bytes(facts) != (folder / FACTS).read_bytes():
            raise ValueError
        version = facts["format_version"]
    except (ValueError, KeyError, TypeError):
        raise ValueError(f"checkpoint {folder} is damaged: {FACTS} doesn't match its own checksum") from None
    if version != FORMAT_VERSION:
        raise ValueError(f"checkpoint {folder} has format version {version}, this code reads {FORMAT_VERSION}")
    with open(folder / TENSORS, "rb") as file:
        if hashlib.file_digest(file, "sha256").hexdigest() != facts["sha256"]:
            raise ValueError(f"checkpoint {folder} is damaged: {TENSORS} doesn't match its checksum")
    shapes = {name: tuple(shape) for name, shape in facts["shapes"].items()}
    known = facts["counters"], facts["kinds"], shapes, facts["client"]
    return Checkpoint(folder, facts["step"], *known, facts.get("groups", []))


# ── small things ─────────────────────────────────────────────────────────────────────────────────────────────────────────────


def facts_bytes(facts: dict[str, Any]) -> bytes:
    """state.json: its own sha256 stands in it, over the rest."""
    rest = {key: value for key, value in facts.items() if key != "sha256_of_this"}
    digest = hashlib.sha256(json.dumps(rest, sort_keys=True).encode()).hexdigest()
    return (json.dumps(rest | {"sha256_of_this": digest}, sort_keys=True, indent=1) + "\n").encode()
