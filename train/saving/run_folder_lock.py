"""One owner for a run folder: the lock of files/folder_lock.py, taken by rank 0 before anybody looks at what lies in it.

A second job on the folder is refused; the next start of the same job waits until the earlier one is surely gone. A process
that has lost the folder writes nothing any more: every file's rename and every row of metrics.jsonl asks the lock.
"""

import os
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch.distributed as dist

from files.folder_lock import FolderInUse, FolderLock
from train.process.peers import VARIABLE
from train.process.ranks import Ranks
from train.saving.checkpoints import object_device

SILENT_SECONDS = 180.0  # an owner elsewhere that gives no sign for so long is taken for dead
BEAT_SECONDS = 5.0


def lock_run_folder(folder: Path, ranks: Ranks, leaving: ExitStack) -> None:
    """Become the owner of `folder`, which is made if need be, until `leaving` is closed; a collective.

    Raises FolderInUse, on all ranks, where another process is at work in it, and PermissionError.
    """
    outcome: list[Any] = [None]
    if ranks.is_main:
        another_start = VARIABLE in os.environ and not os.environ[VARIABLE].endswith("-1")
        patience = SILENT_SECONDS + 2 * BEAT_SECONDS if another_start else 0.0
        try:
            folder.mkdir(parents=True, exist_ok=True)
            times = {"silent_seconds": SILENT_SECONDS, "beat_seconds": BEAT_SECONDS, "wait_seconds": patience}
            leaving.enter_context(FolderLock(folder, "training", say=ranks.say, **times))
        except FolderInUse as error:
            outcome = [error]
        except OSError as error:
            outcome = [type(error)(f"output_path: cannot write to {folder} ({error.strerror})")]
    if dist.get_world_size() > 1:
        dist.broadcast_object_list(outcome, device=object_device())
    if outcome[0] is not None:
        raise outcome[0]
