"""The launcher that started this rank, and whether it is still there: ranks that outlive it would train on unseen.

`deepspeed` is two processes above a rank (its command, and one a node), `torchrun` is one. A shell is no launcher: a run
that was started with `nohup` outlives it.
"""

import os
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import psutil

from train.process.exit_codes import PREEMPTED

COMMANDS = {
    "accelerate",
    "deepspeed",
    "deepspeed.launcher.launch",
    "deepspeed.launcher.runner",
    "torch.distributed.launch",
    "torch.distributed.run",
    "torchrun",
}
LOOK_SECONDS = 1.0


def launchers_above() -> list[psutil.Process]:
    """The launchers among this process's ancestors, nearest first, up to the first that is none."""
    found = []
    for process in psutil.Process().parents():
        try:
            words = process.cmdline()[:5]  # python -u -m module
        except psutil.Error:
            break
        if not any(Path(word).name in COMMANDS for word in words):
            break
        found.append(process)
    return found


def has_ended(process: psutil.Process) -> bool:
    try:
        return not process.is_running() or process.status() == psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return True


def end_at_once(launcher: psutil.Process) -> None:
    """Before a run has anything to save: imports may take a minute more, and nobody waits for them."""
    if os.environ.get("RANK", "0") != "0":
        time.sleep(2)  # a rank's end makes the launcher between end the others: rank 0 speaks first
    else:
        with suppress(OSError):
            os.write(2, f"error: {words(launcher)}: ended before the first step, nothing to save\n".encode())
    os._exit(PREEMPTED)


def words(launcher: psutil.Process) -> str:
    return f"the launcher (process {launcher.pid}) has ended"


class LauncherWatch:
    """A thread that looks every second whether a launcher above has ended, and then calls `gone` once.

    Attributes:
        above: the launchers, as they were when `begin` was called.
    """

    def __init__(self) -> None:
        self.above: list[psutil.Process] = []
        self.gone: Callable[[psutil.Process], None] = end_at_once
        self._process = 0  # that the thread belongs to: a fork has none

    def begin(self) -> None:
        """At the first line of a command: of a launcher that was killed since, the tree of processes tells nothing."""
        if self._process == os.getpid():
            return
        self.above, self._process = launchers_above(), os.getpid()
        if self.above:
            threading.Thread(target=self._look, name="launcher-watch", daemon=True).start()

    def ended(self) -> psutil.Process | None:
        return next(filter(has_ended, self.above), None)

    def _look(self) -> None:
        while (ended := self.ended()) is None:
            time.sleep(LOOK_SECONDS)
        self.gone(ended)


LAUNCHERS = LauncherWatch()  # of this process
