"""Whole files and folders: written under a temporary name, made durable, then renamed; never seen half written.

    write_file(path, data)                              # bytes or text

    with whole_file(path) as file:                      # as it comes; an exception leaves what was there before
        for block in blocks:
            file.write(block)

    with whole_folder(path) as partial:                 # a folder to fill; it gets its name when the block ends
        write_file(partial / "config.json", text)

The order is the textbook's: write, fsync, rename (atomic in one folder, on NFS too), fsync of the folder, without which
a power cut can undo the rename. Files get the mode that the user's umask gives.
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
import shutil
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

from files.folder_lock import require_owned

PARTIAL = ".partial-"  # prefix of everything that is not finished yet


def partial_path(path: Path) -> Path:
    """Where `path` is written before it is renamed; names host and process so that writers never meet."""
    return path.with_name(f"{PARTIAL}{path.name}.{socket.gethostname()}.{os.getpid()}")


def commit(partial: Path, path: Path) -> None:
    """Rename a finished, fsynced file or folder into place and make the rename durable.

    Raises FolderLost in a folder whose lock this process had, and lost.
    """
    require_owned(path)
    os.replace(partial, path)
    sync_folder(path.parent)


def sync_folder(folder: Path) -> None:
    """Make new names in a folder durable, where its file system can."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):  # some network file systems have no fsync of folders
            raise
    finally:
        os.close(descriptor)


@contextlib.contextmanager
def whole_file(path: Path) -> Iterator[IO[bytes]]:
    """An open file that becomes `path` when the block ends, or leaves no trace when it raises (a full disk, say)."""
    partial = partial_path(path)
    try:
        with open(partial, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        commit(partial, path)
    finally:
        partial.unlink(missing_ok=True)


def write_file(path: Path, data: bytes | str) -> None:
    """Write a whole small file (text as UTF-8) so that readers see the old one or the new one, never half of it."""
    with whole_file(path) as file:
        file.write(data.encode() if isinstance(data, str) else data)


@contextlib.contextmanager
def whole_folder(path: Path) -> Iterator[Path]:
    """A new empty folder that becomes `path` when the block ends, or goes when it raises.

    A folder that stands at `path` by then is replaced. Files in it must be durable themselves: `write_file`, `whole_file`.
    """
    partial = partial_path(path)
    shutil.rmtree(partial, ignore_errors=True)
    try:
        partial.mkdir(parents=True)
        yield partial
        sync_folder(partial)
        if path.exists():
            shutil.rmtree(path)
        commit(partial, path)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def json_bytes(value: Any) -> bytes:
    """JSON whose bytes depend on the value alone: UTF-8, sorted keys, two spaces, newline at the end."""
    return (json.dumps(value, ensure_ascii=False, sort_keys=True, indent=2, allow_nan=False) + "\n").encode()


def remove_abandoned(folder: Path) -> None:
    """Delete the partial files and folders in `folder` that processes of this host left when they were killed."""
    for partial in folder.glob(f"{PARTIAL}*"):
        _, _, owner = partial.name.rpartition(f".{socket.gethostname()}.")
        if owner.isdigit() and int(owner) != os.getpid() and not _alive(int(owner)):
            if partial.is_dir() and not partial.is_symlink():
                shutil.rmtree(partial, ignore_errors=True)
            else:
                partial.unlink(missing_ok=True)


def _alive(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True
