"""The folder that a packing run writes into: made, seen to be writable, and held against a second run."""

from __future__ import annotations

import contextlib
import errno
import re
from collections.abc import Iterator
from pathlib import Path

from data_prep.packing.plan import PLAN_FOLDER, plan_file, rows_file
from data_prep.shard_format.shards import MANIFEST
from files.atomic_files import remove_abandoned, write_file
from files.folder_lock import FolderLock, Holder
from files.shown import shown

LOCKS = "lock"  # plan/lock/TASK-of-TASKS/, and lock/RANK-of-WORLD/ while encoding


def prepare_output(folder: Path) -> None:
    """Make the output folder and see that files can be written there. Raises ValueError or OSError."""
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"--output_path {shown(folder)}: is a file, not a folder")
    if (folder / MANIFEST).exists() and not (plan_file(folder).exists() or rows_file(folder).exists()):
        raise ValueError(
            f"--output_path {shown(folder)} holds a data set that this program did not make: choose another folder"
        )
    try:
        (folder / PLAN_FOLDER).mkdir(parents=True, exist_ok=True)
        probe = folder / PLAN_FOLDER / ".writable"
        write_file(probe, b"")
        probe.unlink(missing_ok=True)
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise
        raise ValueError(f"--output_path {shown(folder)}: cannot be written to ({error.strerror})") from None
    remove_abandoned(folder)
    remove_abandoned(folder / PLAN_FOLDER)


@contextlib.contextmanager
def output_lock(locks: Path, purpose: str, task_id: int, num_tasks: int) -> Iterator[FolderLock]:
    """Hold the right to write this task's shards; `locks` is the output's folder of locks.

    The tasks of one array share the folder; everybody else waits for them.

    Raises FolderInUse, which names the holder, when the same task, or a run that cuts the shards up differently, is at work.
    The lock's folder goes at the end, so that a finished set holds the same files whatever went before.
    """
    mine = locks / f"{task_id}-of-{num_tasks}"
    mine.mkdir(parents=True, exist_ok=True)
    try:
        with FolderLock(mine, f"{purpose}, task {task_id} of {num_tasks}") as lock:
            for other in sorted(
                locks.iterdir()
            ):  # after taking ours: of two that begin together none overlooks the other
                found = re.fullmatch(r"\d+-of-(\d+)", other.name)
                if found and int(found[1]) != num_tasks:
                    with FolderLock(other, "looking whether it is free"):
                        pass
                    _remove(other)
            yield lock
    finally:
        _remove(mine)


def _remove(lock: Path) -> None:
    """Remove a lock's folder if its holder has released it and nobody has taken it since."""
    with contextlib.suppress(OSError):
        files = list(lock.iterdir())
        holders = [Holder.read(file) for file in files]
        if all(holder is not None and holder.released for holder in holders):
            for file in files:
                file.unlink()
            lock.rmdir()
            lock.parent.rmdir()
