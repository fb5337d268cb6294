"""The launcher that started this rank, and whether it is still there: ranks that outlive it would train on unseen.

`deepspeed` is two processes above a rank (its command, and one a node), `torchrun` is one. A shell is no launcher: a run
that was started with `nohup` outlives it.
"""

import threading
from collections.abc import Callable
from pathlib import Path

import psutil

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


def watch_launchers(gone: Callable[[psutil.Process], None]) -> threading.Event:
    """Call `gone` once, from a thread of its own, when a launcher above has ended. Set what is returned to stop watching."""
    above, stop = launchers_above(), threading.Event()

    def look() -> None:
        while not stop.wait(LOOK_SECONDS):
            for process in above:
                if not process.is_running() or process.status() == psutil.STATUS_ZOMBIE:
                    gone(process)
                    return

    if above:
        threading.Thread(target=look, name="launcher-watch", daemon=True).start()
    return stop
