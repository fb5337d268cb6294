"""One writer for a folder, on a shared disk too: whoever takes it is named in it, and is replaced once surely gone.

    with FolderLock(folder, "training") as lock:        # FolderInUse names the holder
        …
        lock.require()                                  # before each write: FolderLost if another has taken over
        if lock.still_mine(): …                         # the same as a question

How. The owner of generation N is whoever created the file `.lock-N`; the highest generation counts. A take-over creates
`.lock-N+1`, which the file system lets exactly one process do (a hard link to a finished file, or O_EXCL: both are atomic
on NFS, which flock is not everywhere). Nobody ever removes the highest one, so a slow rival that still believes an old
generation to be the last finds a higher one after its own creation, and steps back. At the end the file is marked as
released and stays.

Each owner touches its file every few seconds. Its successor may take over
- at once, when the owner is provably gone: same host, same boot, same process namespace, and no process of that id
  with that start time lives (a zombie does not); kill -9 and power cuts of this host come under it;
- else when the file was not touched for `silent_seconds`. Times are the file server's alone, no two clocks are compared.
A stopped process (SIGSTOP, a suspended job) loses the folder that way, and learns it when it asks before its next write.
What it had begun to write before cannot be called back, so ask right before the rename that makes a write visible:
files/atomic_files.py does so for every file in a folder that this process has locked.
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
import re
import secrets
import socket
import threading
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from files.shown import shown

PREFIX = ".lock-"
SILENT_SECONDS = 600.0  # a process may hang on a slow disk for minutes and still live
BEAT_SECONDS = 15.0
POLL_SECONDS = 1.0  # between looks while waiting for a holder
ABANDONED_SECONDS = 86_400.0  # a draft lives for milliseconds
NO_LINKS = {errno.EPERM, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS, errno.EMLINK, errno.EXDEV}
UNKNOWN = "?"


class FolderInUse(OSError):
    """Another process holds the folder; the message names it."""


class FolderLost(OSError):
    """This process held the folder, and another has taken it over since; the message names it."""


@dataclass(frozen=True)
class Holder:
    """Who holds a folder, as it stands in the lock file."""

    host: str
    boot: str  # the kernel's id of this start of the machine
    namespace: str  # of process ids: containers on one machine count their own
    process: int
    process_start: str  # clock ticks after the boot: a process id is used again, with another start
    job: str  # the scheduler's, "" without one
    purpose: str
    began: str  # UTC
    token: str  # of this very lock
    released: bool = False

    @classmethod
    def this_process(cls, purpose: str) -> Holder:
        job = next((os.environ[name] for name in ("SLURM_JOB_ID", "PBS_JOBID", "LSB_JOBID") if name in os.environ), "")
        process = os.getpid()
        return cls(
            host=socket.gethostname(),
            boot=_read("/proc/sys/kernel/random/boot_id"),
            namespace=_process_namespace(),
            process=process,
            process_start=_process_start(process) or UNKNOWN,
            job=job,
            purpose=purpose,
            began=time.strftime("%Y-%m-%d %H:%M:%S UTC", time.gmtime()),
            token=secrets.token_hex(8),
        )

    @classmethod
    def read(cls, path: Path) -> Holder | None:
        """The holder that a lock file names; None when the file holds something else (half a file, say)."""
        try:
            fields = json.loads(path.read_bytes())
            holder = cls(**fields)
        except (ValueError, TypeError):
            return None
        wrong = [name for name, value in fields.items() if type(value) is not _TYPES[name]]
        return None if wrong else holder

    def is_gone(self) -> bool:
        """Whether its process has ended, for certain. False when it can't be known from here."""
        here = Holder.this_process("")
        places = [(self.host, here.host), (self.boot, here.boot), (self.namespace, here.namespace)]
        if any(there != mine or there == UNKNOWN for there, mine in places) or self.process_start == UNKNOWN:
            return False
        return _process_start(self.process) not in (self.process_start, UNKNOWN)

    def __str__(self) -> str:
        job = f", job {shown(self.job)}" if self.job else ""
        return f"process {self.process} on {shown(self.host)}{job} ({shown(self.purpose)}, since {shown(self.began)})"


_TYPES: dict[str, type] = dict.fromkeys(Holder.__dataclass_fields__, str) | {"process": int, "released": bool}


class FolderLock:
    """The right to write into `folder`, from the construction until `release`, the end of `with`, or of the process.

    Args:
        folder: exists.
        purpose: a word for people: what the holder does there.
        silent_seconds: an owner that gives no sign for so long has lost the folder.
        wait_seconds: wait so long for a holder before FolderInUse (a job that was queued again outlives its first start).
        say: where the line about a take-over goes.

    Raises FolderInUse, and PermissionError or another OSError where the folder can't be written to. Threads may share
    one; a forked child holds nothing, and its `release` does nothing.
    """

    def __init__(
        self,
        folder: Path,
        purpose: str,
        *,
        silent_seconds: float = SILENT_SECONDS,
        beat_seconds: float = BEAT_SECONDS,
        wait_seconds: float = 0.0,
        say: Callable[[str], None] = print,
    ) -> None:
        assert 0 < 2 * beat_seconds <= silent_seconds, "one late beat is no silence"
        self.folder, self.silent_seconds, self.say = folder, silent_seconds, say
        self.me = Holder.this_process(purpose)
        self._lost = False
        self._generation = self._take(time.monotonic() + wait_seconds)
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._beat, args=(beat_seconds,), name="folder-lock", daemon=True)
        self._thread.start()
        _held.append(self)

    # ── for the holder ───────────────────────────────────────────────────────────────────────────────────────────────

    def still_mine(self) -> bool:
        """Whether this process still holds the folder; looks at the disk. Raises OSError where the disk doesn't answer."""
        if self._lost or self._ended.is_set() or self.me.process != os.getpid():
            return False
        try:  # opening makes an NFS client ask the server; a listing alone may be a minute old
            holder = Holder.read(self._path(self._generation))
        except FileNotFoundError:
            holder = None
        self._lost = holder is None or holder.token != self.me.token or self._highest() > self._generation
        return not self._lost

    def require(self) -> None:
        """Go on only as the holder. Raises FolderLost, which names who has taken over."""
        if not self.still_mine():
            raise FolderLost(f"{shown(self.folder)} is no longer this process's: {self._successor()}")

    def release(self) -> None:
        """Let others have the folder. May be called twice, and after the folder was lost or removed."""
        if self._ended.is_set() or self.me.process != os.getpid():
            return
        _held.remove(self)
        with contextlib.suppress(OSError):  # then the next one finds a process that is gone
            if self.still_mine():
                try:
                    released = Holder(**asdict(self.me) | {"released": True})
                    self._write_draft(released).rename(self._path(self._generation))
                except OSError:  # a full disk still takes a time
                    os.utime(self._path(self._generation), (0, 0))
        self._ended.set()
        if self._thread is not threading.current_thread():
            self._thread.join()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.release()

    # ── how it is done ───────────────────────────────────────────────────────────────────────────────────────────────

    def _take(self, deadline: float) -> int:
        waiting = False
        while True:
            draft = self._write_draft(self.me)
            try:
                highest = self._highest()
                refusal, note = self._judge(highest, draft.stat().st_mtime)
                if refusal is None and self._create(draft, highest + 1):
                    if self._highest() == highest + 1:
                        self._remove_below(highest + 1)
                        if note:
                            self.say(note)
                        return highest + 1
                    self._path(highest + 1).unlink(missing_ok=True)  # others were faster, by more than one generation
            finally:
                draft.unlink(missing_ok=True)
            if refusal is not None:
                if time.monotonic() >= deadline:
                    raise FolderInUse(refusal)
                if not waiting:
                    self.say(f"{refusal}; waiting for it up to {deadline - time.monotonic():.0f} s")
                    waiting = True
                time.sleep(min(POLL_SECONDS, max(deadline - time.monotonic(), 0.0)))

    def _judge(self, generation: int, now: float) -> tuple[str | None, str]:
        """(why the folder can't be had, or None; what to say when it is taken). `now`: the file server's time."""
        path = self._path(generation)
        try:
            holder, touched = Holder.read(path), path.stat().st_mtime
        except FileNotFoundError:  # no lock at all, or a rival has just taken over: then creating fails
            return None, ""
        if (holder is not None and holder.released) or touched == 0:
            return None, ""
        name = "a process that it doesn't name" if holder is None else str(holder)
        silent = now - touched
        if holder is not None and holder.is_gone():
            return None, f"took over {shown(self.folder)} from {name}, which has ended without a word"
        if silent >= self.silent_seconds:
            return None, f"took over {shown(self.folder)} from {name}, which has been silent for {silent:.0f} s"
        return (
            f"{shown(self.folder)} is in use by {name}, last heard of {max(silent, 0):.0f} s ago: wait until it ends, or "
            f"choose another folder (it is taken for dead after {self.silent_seconds:.0f} s of silence)"
        ), ""

    def _write_draft(self, holder: Holder) -> Path:
        """A finished lock file under a name of its own; its time is the file server's now."""
        draft = self.folder / f"{PREFIX}draft-{self.me.token}"
        with open(draft, "wb") as file:
            file.write(json.dumps(asdict(holder)).encode() + b"\n")
            file.flush()
            os.fsync(file.fileno())
        return draft

    def _create(self, draft: Path, generation: int) -> bool:
        """Make the lock file of `generation`; False when another process was faster."""
        path = self._path(generation)
        try:
            os.link(draft, path)
        except FileExistsError:
            return draft.stat().st_nlink == 2  # NFS: a repeated request fails on its own success
        except OSError as error:
            if error.errno not in NO_LINKS:
                raise
            try:
                with open(path, "xb") as file:  # until it is written it names nobody, and is silent from its birth on
                    file.write(draft.read_bytes())
                    file.flush()
                    os.fsync(file.fileno())
            except FileExistsError:
                return False
        return True

    def _path(self, generation: int) -> Path:
        return self.folder / f"{PREFIX}{generation:06d}"

    def _generations(self) -> list[int]:
        found = (re.fullmatch(rf"{re.escape(PREFIX)}(\d{{6,}})", name) for name in os.listdir(self.folder))
        return sorted(int(match[1]) for match in found if match)

    def _highest(self) -> int:
        return max(self._generations(), default=0)

    def _remove_below(self, generation: int) -> None:
        """Tell former owners, by removing their files (another user's may stay: the higher generation tells them too)."""
        for old in self._generations():
            if old < generation:
                with contextlib.suppress(OSError):
                    self._path(old).unlink()
        for draft in self.folder.glob(f"{PREFIX}draft-*"):  # of processes that were killed while they tried
            with contextlib.suppress(OSError):
                holder = Holder.read(draft)
                gone = holder is not None and holder.is_gone()
                if gone or time.time() - draft.stat().st_mtime > ABANDONED_SECONDS:
                    draft.unlink()

    def _beat(self, seconds: float) -> None:
        while not self._ended.wait(seconds):
            with contextlib.suppress(OSError):  # a disk that doesn't answer now may do so at the next beat
                if not self.still_mine():
                    return
                os.utime(self._path(self._generation))

    def _successor(self) -> str:
        with contextlib.suppress(OSError):
            highest = self._highest()
            holder = Holder.read(self._path(highest)) if highest > self._generation else None
            if holder is not None:
                return f"{holder} has taken it over"
        return "its lock was removed"


_held: list[FolderLock] = []  # by this process


def require_owned(path: Path) -> None:
    """Go on to write `path` unless it is in a folder that this process had locked and lost. Raises FolderLost."""
    for lock in list(_held):
        if lock.me.process == os.getpid() and lock.folder.absolute() in path.absolute().parents:
            lock.require()


def release_all() -> None:
    """Give back what this process has locked: for one that is about to leave without unwinding."""
    for lock in list(_held):
        lock.release()


def _read(path: str) -> Any:
    try:
        return Path(path).read_text().strip()
    except OSError:
        return UNKNOWN


def _process_namespace() -> str:
    try:
        return os.readlink("/proc/self/ns/pid")
    except OSError:
        return UNKNOWN


def _process_start(process: int) -> str | None:
    """The start of a process in clock ticks after the boot (proc(5), stat, field 22); None when it has ended."""
    try:
        after_name = Path(f"/proc/{process}/stat").read_text(errors="replace").rpartition(")")[2].split()
    except OSError:
        return UNKNOWN if _exists(process) else None  # another user's may be hidden
    return None if after_name[0] in "ZX" else after_name[19]


def _exists(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True
