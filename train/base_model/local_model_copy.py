"""`--local_model_copy`: weights are read from a disk of each node, where one rank of the node copies them first.

    base = on_local_disks(base, encoded, config.local_model_copy, ranks)        # a collective

So the shared file system gives each byte once a node, and none to a later start that finds the copy. It lies in
FOLDER/<model>-<component>-<fingerprint of its weights>, gets that name when it is complete and compared, and stays: who
needs the room removes the folder. Processes that want to copy at the same time, of other jobs too, wait for each other. Where
there is no room, or the disk fails, the node reads from where the model lies, and says so.
"""

import os
import shutil
import socket
import time
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import torch.distributed as dist

from files.atomic_files import remove_abandoned, whole_file, whole_folder
from files.folder_lock import FolderLock
from files.shown import shown, shown_bytes
from qwen_image.loading.model_files import Component, ModelFiles, resolve_model, weights_fingerprint
from train.base_model.base_plan import BasePlan
from train.config.check_paths import local_folder
from train.process.ranks import Ranks

WAIT_SECONDS = 1800.0  # for another process that copies
CHUNK = 16 << 20
SPARE_BYTES = 1 << 30  # what else a disk needs


class Outcome(NamedTuple):
    """What one node came to.

    Attributes:
        node: its name; `local_rank`: of the rank that looked after it, 0, or of one that didn't.
        folders: component → the folder of its copy; {} where there is none.
        line: for people.
    """

    node: str
    local_rank: int
    folders: dict[str, Path]
    line: str


def on_local_disks(base: BasePlan, encoded: bool, option: Path | None, ranks: Ranks) -> BasePlan:
    """`base` with its files on this node's disk where they could be copied; unchanged without the option."""
    if option is None:
        return base
    components = ("transformer",) if encoded else ("transformer", "text_encoder", "vae")
    files = resolve_model(base.source, components)
    node = os.environ.get("SLURMD_NODENAME") or socket.gethostname()
    mine = Outcome(node, ranks.local_rank, {}, "")
    if ranks.local_rank == 0:
        mine = copies_of(files, local_folder(option), node)
    outcomes: list[Any] = [mine]
    if ranks.world > 1:
        outcomes = [None] * ranks.world
        dist.all_gather_object(outcomes, mine)
    first = [Outcome(*one) for one in outcomes if one[1] == 0]
    for line, times in Counter(one.line for one in first).items():
        ranks.say(line + (f" (on {times} nodes)" if times > 1 else ""))
    here = next((one.folders for one in first if one.node == node), {})
    paths: dict[str, Any] = {f"{component}_path": str(folder) for component, folder in here.items()}
    return replace(base, source=replace(base.source, **paths))


def copies_of(files: ModelFiles, folder: Path, node: str) -> Outcome:
    """Find or make the copies of all components; an OSError leaves the node without."""
    began, copied = time.monotonic(), 0
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with FolderLock(folder, "copying weights", wait_seconds=WAIT_SECONDS):
            remove_abandoned(folder)
            found = {}
            for name, component in files.components.items():
                found[name] = folder / f"{Path(files.name).name}-{name}-{files.fingerprint(name)}"
                copied += make_copy(component, found[name])
    except OSError as error:
        return Outcome(node, 0, {}, f"warning: {node} reads the weights from where they lie: local_model_copy: {error}")
    how = f"{shown_bytes(copied)} copied to" if copied else "found in"
    return Outcome(node, 0, found, f"weights: {how} {shown(folder)} in {time.monotonic() - began:.0f} s")


def make_copy(component: Component, folder: Path) -> int:
    """Make `folder` a copy of a component's configuration and weights, unless it is one; returns bytes copied.

    Weight files are numbered in the order of their names. Raises OSError without room, or for a copy that differs.
    """
    ordered = sorted(component.weights, key=lambda path: path.name)
    names = {path: f"model-{number:05d}.safetensors" for number, path in enumerate(ordered)}
    original = weights_fingerprint(component.weights)
    if folder.is_dir() and is_copy(folder, names, original):
        return 0
    size = sum(path.stat().st_size for path in component.weights)
    free = shutil.disk_usage(folder.parent).free
    if free < size + SPARE_BYTES:
        raise OSError(f"{shown(folder.parent)} has {shown_bytes(free)} left, the copy needs {shown_bytes(size)}")
    with whole_folder(folder) as partial:
        for path in component.folder.glob("*.json"):
            if not path.name.endswith(".index.json"):  # it names files by their old names
                shutil.copyfile(path, partial / path.name)
        for path, name in names.items():
            copy_file(path, partial / name)
        if not is_copy(partial, names, original):
            raise OSError(f"the copy in {shown(folder.parent)} is not what was read: a faulty disk?")
    return size


def is_copy(folder: Path, names: dict[Path, str], fingerprint: str) -> bool:
    """Whether every weight file is there with the original's size and pieces."""
    try:
        sizes = all((folder / name).stat().st_size == path.stat().st_size for path, name in names.items())
        return sizes and weights_fingerprint(folder / name for name in names.values()) == fingerprint
    except FileNotFoundError:
        return False


def copy_file(source: Path, target: Path) -> None:
    """Byte by byte, durable at the end; the pages read are of no use to anybody else and are given back."""
    with open(source, "rb") as file, whole_file(target) as copy:
        while block := file.read(CHUNK):
            copy.write(block)
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
