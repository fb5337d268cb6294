"""The first rank that fails says why, and all others leave for that reason, with its exit code.

An error on one rank makes others fail a moment later (a closed connection) or wait for ever, and a launcher shows whichever
came last. So the reason is a file, which exactly one rank can create: `first_error` in the folder of `Peers`. Each rank's
watchdog looks for it every second, and the job script prints it at the end and decides by its code.
"""

import os
import re
import socket
import time
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

from files.shown import one_line
from train.process.exit_codes import RANK_LOST
from train.process.peers import Peers

NAME = "first_error"
PATIENCE_SECONDS = 8.0  # for the rank whose death closed a connection: its own word is the better one
SILENT_SECONDS = 3.5  # of a rank that gives a sign every second
OTHERS = "ranks of another job have joined"
# What gloo and NCCL say when another rank has gone, whose own reason is elsewhere; their errors have no class of their own.
SIGNS = (
    OTHERS,
    *(
        "gloo/transport",
        "Connection closed by peer",
        "Connection reset by peer",
        "Broken pipe",
        "remote process exited",
    ),
    "Connection was likely closed",  # TCPStore, while ranks join
    *("NCCL error", "NCCL communicator", "Connection refused", "TCPStore", "EADDRINUSE", "address already in use"),
)


class FirstError(NamedTuple):
    code: int
    who: str
    reason: str


def tell_first(peers: Peers, code: int, reason: str, who: int | None = None) -> bool:
    """Give `reason` as the job's, `who` (this rank) as the one that failed; False if another rank was faster."""
    name = peers.named(peers.rank if who is None else who)
    draft = peers.folder / f".{NAME}-{peers.rank}-{os.getpid()}"
    with suppress(OSError):
        draft.write_text(f"{code}\n{name}\n{one_line(reason.removeprefix('error: '))}\n", encoding="utf-8")
        try:
            os.link(draft, peers.folder / NAME)
            return True
        except FileExistsError:
            return False
        except OSError:  # a file system without links: whoever renames last wins, which is nearly as good
            if not (peers.folder / NAME).exists():
                draft.rename(peers.folder / NAME)
                return True
            return False
        finally:
            draft.unlink(missing_ok=True)
    return False


def was_told(peers: Peers, reason: str) -> bool:
    """Whether the job's first error is this very one: nobody needs it once a rank."""
    first = read_first(peers)
    return first is not None and first.reason == one_line(reason.removeprefix("error: "))


def read_first(peers: Peers) -> FirstError | None:
    path: Path = peers.folder / NAME
    try:
        code, who, reason = path.read_text(encoding="utf-8").splitlines()[:3]
        return FirstError(int(code), who, reason)
    except (OSError, ValueError):
        return None


def rank_was_lost(error: BaseException) -> bool:
    """Whether it says no more than that another rank has ended, or can't be reached."""
    return isinstance(error, RuntimeError) and not shared_gpu(error) and any(sign in str(error) for sign in SIGNS)


def shared_gpu(error: BaseException) -> str | None:
    """For people: NCCL's refusal of two ranks on one GPU, which no restart mends; None for any other error."""
    found = re.search(r"Duplicate GPU detected\s*:\s*(.*)", str(error))
    if found is None:
        return None
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    shown = "not set" if visible is None else repr(visible)
    return (
        f"{found[1].strip()} of {socket.gethostname()}: NCCL wants a GPU for each rank, and slices of one (MIG) count as one; "
        f"start as many ranks on a node as it has GPUs (CUDA_VISIBLE_DEVICES is {shown})"
    )


def first_words(error: BaseException) -> str:
    """What an error of gloo or NCCL says, without the place in their sources and their guesses."""
    line = (str(error).strip() or type(error).__name__).splitlines()[0]
    return re.sub(r"\[[^\]]*\.(cc|cpp|h):\d+\] *", "", line).partition(" This is typically")[0].rstrip(". ")


def blame(peers: Peers, error: BaseException) -> FirstError:
    """Who is at fault for a lost connection: whoever says so within seconds, else who has fallen silent, else this rank."""
    end = time.monotonic() + PATIENCE_SECONDS
    while time.monotonic() < end:
        if (first := read_first(peers)) is not None:
            return first
        with suppress(OSError):
            silent = [rank for rank in peers.silent(SILENT_SECONDS) if rank != peers.rank]
            if silent and time.monotonic() > end - PATIENCE_SECONDS / 2:
                tell_first(peers, RANK_LOST, silence_of(peers, silent), silent[0])
        time.sleep(0.2)
    tell_first(peers, RANK_LOST, f"{type(error).__name__}: {first_words(error)}")
    return read_first(peers) or FirstError(RANK_LOST, peers.named(peers.rank), first_words(error))


def silence_of(peers: Peers, silent: list[int]) -> str:
    """For people: which ranks give no sign, and what that can mean."""
    names = ", ".join(peers.named(rank) for rank in silent[:4]) + (", …" if len(silent) > 4 else "")
    return f"no sign of {names}: killed (out of host memory?), stopped, or the node is lost or cut off"
