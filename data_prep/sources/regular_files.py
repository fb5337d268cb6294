"""Opening files that may be anything: FIFOs and devices would hang or never end, so only regular files are opened."""

from __future__ import annotations

import os
import stat
from pathlib import Path
from typing import IO

NOT_REGULAR_KINDS = {
    stat.S_IFIFO: "a FIFO",
    stat.S_IFCHR: "a device",
    stat.S_IFBLK: "a device",
    stat.S_IFSOCK: "a socket",
    stat.S_IFDIR: "a folder",
}


class NotRegular(OSError):
    """A file that is none: `strerror` says what it is."""


def open_regular(path: str | bytes | Path, buffering: int = -1) -> IO[bytes]:
    """Open a regular file for reading. Raises NotRegular (an OSError) for anything else, without waiting for it."""
    # Not blocking: opening a FIFO would wait for a writer. Looked at after opening, so that nothing can change in between.
    descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    try:
        check_regular(os.fstat(descriptor), path)
        return open(descriptor, "rb", buffering=buffering)
    except BaseException:
        os.close(descriptor)
        raise


def read_regular(path: str | bytes | Path) -> bytes:
    """Content of a regular file. Raises OSError, NotRegular among them."""
    with open_regular(path) as file:
        return file.read()


def check_regular(status: os.stat_result, path: str | bytes | Path) -> None:
    """Raise NotRegular unless it is a regular file's status."""
    kind = stat.S_IFMT(status.st_mode)
    if kind != stat.S_IFREG:
        raise NotRegular(
            0, f"not a regular file but {NOT_REGULAR_KINDS.get(kind, 'something else')}", os.fsdecode(path)
        )
