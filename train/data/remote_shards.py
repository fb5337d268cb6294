"""Shards that lie elsewhere (s3://, gs://, hf://, http://), read through fsspec.

    folder, reader = open_remote("s3://bucket/encoded", cache_folder=Path("/local/cache"))
    reader.read(shard, offset, size)

A sample is read from the local copy of its shard when there is one (train/data/remote_cache.py makes them, and compares
them with the manifest's sha256), and else from the remote by its byte range, which nothing can be compared with. A shard
that came wrong twice is broken: its samples are handled as broken ones. A remote that stops answering ends the run, after
some minutes: taking other samples instead would make the training depend on the network.
"""

import hashlib
import os
import sys
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from data_prep.shard_format.shards import EMPTY_PROMPT, INDEX, MANIFEST, Manifest, read_manifest
from files.atomic_files import whole_file
from files.shown import one_line, shown

WAITS = (0.5, 2, 8, 30, 60, 60)  # seconds between tries of one remote read: networks have moments, servers restart
SAID_FROM = 8  # a wait that long is told
FINAL = (FileNotFoundError, PermissionError, NotImplementedError, ImportError)  # another try gives the same answer


class Unreachable(ConnectionError):
    """The remote gave no answer, often enough; the message says which file and why."""


def is_remote(folder: str | Path) -> bool:
    return "://" in str(folder)


def open_remote(url: str, cache_folder: Path) -> tuple[Path, "RemoteReader"]:
    """Copy manifest, index and empty prompt of a remote data set into a folder of its own under `cache_folder`.

    Returns that folder and the reader of its samples. Raises FileNotFoundError when there is no finished data set,
    Unreachable, ValueError for a server that can't give a part of a file, and OSError naming a cache that can't be written.
    """
    folder = cache_folder / hashlib.sha256(url.encode()).hexdigest()[:16]
    remote = Remote(url, waits=3)  # at start it is rather a wrong address
    try:
        manifest = remote.read(MANIFEST)
    except FileNotFoundError:
        raise FileNotFoundError(f"{url} holds no {MANIFEST}: remote data sets must be finished and indexed") from None
    try:
        fill(folder, remote, manifest)
    except (Unreachable, FileNotFoundError):
        raise
    except OSError as error:
        raise OSError(
            f"data_cache_path: {shown(folder)} can't be written ({error.strerror}): free some, or name another"
        ) from None
    reader = RemoteReader(url, folder, read_manifest(folder))
    for name in reader.names[:1]:  # what can't be read is refused here, not in the midst of training
        try:
            remote.read(name, 0, 1)
        except FileNotFoundError:
            raise FileNotFoundError(f"{url} holds no {name}, though its {MANIFEST} lists it") from None
    return folder, reader


def fill(folder: Path, remote: "Remote", manifest: bytes) -> None:
    """Manifest, index and empty prompt into the cache, and nothing of an older data set beside them."""
    folder.mkdir(parents=True, exist_ok=True)  # one that is filled may be read-only: nothing is written that is there
    changed = not (folder / MANIFEST).is_file() or (folder / MANIFEST).read_bytes() != manifest
    for name in (INDEX, EMPTY_PROMPT):
        if changed or not (folder / name).is_file():
            try:
                write_whole(folder / name, [remote.read(name)])
            except FileNotFoundError:
                if name == INDEX:
                    raise FileNotFoundError(
                        f"{remote.url} holds no {INDEX}: remote data sets must be indexed"
                    ) from None
    if changed:
        for stale in folder.glob("*.tar*"):  # copies and what is known of them
            stale.unlink(missing_ok=True)
        write_whole(folder / MANIFEST, [manifest])


class Remote:
    """The files of a remote folder, asked for again after each of the first `waits` of WAITS."""

    def __init__(self, url: str, waits: int = len(WAITS)) -> None:
        self.url, self.waits = url.rstrip("/"), waits

    def read(self, name: str, start: int | None = None, end: int | None = None) -> bytes:
        """The bytes [start, end) of a file, fewer where it ends before.

        Raises those of FINAL at once, Unreachable, and ValueError when the whole file comes instead of a part.
        """
        path = f"{self.url}/{name}"
        for wait in (*WAITS[: self.waits], None):
            filesystem = self._filesystem()
            try:
                data = filesystem.cat_file(path, start=start, end=end)
                break
            except FINAL:
                raise
            except Exception as error:  # each protocol's package has errors of its own
                if end is not None and self._ends_before(path, end):
                    return b""  # asked for what lies behind a file's end, a server may also say that it can't
                why = f"{path}: {type(error).__name__}: {' '.join(str(error).split())}"
                if wait is None:
                    raise Unreachable(why) from error
                if wait >= SAID_FROM:
                    print(f"warning: {one_line(why)}; trying again in {wait} s", file=sys.stderr, flush=True)
                time.sleep(wait)
        if start is not None and end is not None and len(data) > end - start:
            raise ValueError(
                f"{path}: asked for {end - start} bytes, got {len(data)}: the server knows no byte ranges; copy the data "
                "set here, or take --loader webdataset"
            )
        return data

    def _ends_before(self, path: str, end: int) -> bool:
        try:
            return int(self._filesystem().size(path)) < end
        except Exception:  # no answer to this either: it is the network
            return False

    def _filesystem(self) -> Any:
        """This process's connections to the protocol."""
        import fsspec

        key = os.getpid(), self.url.partition("://")[0]
        if key not in _filesystems:
            _filesystems[key] = fsspec.filesystem(key[1], skip_instance_cache=True)
        return _filesystems[key]


# (process, protocol) → fsspec's filesystem. They don't survive a fork, and a child that only frees its parent's waits
# seconds for an event loop that it doesn't have: so none is ever freed.
_filesystems: dict[tuple[int, str], Any] = {}


class RemoteReader:
    """Reads members as ShardReader does: locally where the shard has been copied, else remotely."""

    def __init__(self, url: str, folder: Path, manifest: Manifest) -> None:
        self.remote, self.folder, self.manifest = Remote(url), folder, manifest
        self.names = [shard.name for shard in manifest.shards]
        self._files: dict[int, int] = {}
        self._process = os.getpid()

    def read(self, shard: int, offset: int, size: int) -> bytes:
        """`size` bytes at `offset` of a shard. Raises Unreachable, FileNotFoundError, and ValueError for a shard that is too
        short or known as wrong."""
        data, file = b"", self._open(shard)
        if file is not None:
            data = os.pread(file, int(size), int(offset))
        if len(data) != size:  # no copy, or one that was cut since it was opened
            if self.wrong_mark(shard).exists():
                raise ValueError(f"{self.remote.url}/{self.names[shard]} doesn't match the manifest's sha256")
            data = self.remote.read(self.names[shard], int(offset), int(offset) + int(size))
        if len(data) != size:
            raise ValueError(f"{self.remote.url}/{self.names[shard]} ends before byte {int(offset) + int(size)}")
        return data

    def wrong_mark(self, shard: int) -> Path:
        """The file that tells all readers of the cache that this shard's bytes are not the manifest's."""
        return self.folder / f"{self.names[shard]}.wrong"

    def verified_mark(self, shard: int) -> Path:
        """The file that says which local copy was compared with the manifest: its size and time of change."""
        return self.folder / f"{self.names[shard]}.verified"

    def is_verified(self, shard: int, copy: os.stat_result) -> bool:
        """Whether a local copy is the one that was compared, and whole: it may have been cut or edited since."""
        try:
            known = self.verified_mark(shard).read_text()
        except (OSError, ValueError):
            return False
        return known == copy_state(copy) and copy.st_size == self.manifest.shards[shard].bytes

    def _open(self, shard: int) -> int | None:
        if self._process != os.getpid():  # forked: the parent's descriptors are not ours
            self._files, self._process = {}, os.getpid()
        if shard in self._files:
            return self._files[shard]
        for other, descriptor in list(self._files.items()):
            if os.fstat(descriptor).st_nlink == 0:  # dropped from the cache; the disk gets its space back at the close
                os.close(descriptor)
                del self._files[other]
        try:
            file = os.open(self.folder / self.names[shard], os.O_RDONLY)
        except FileNotFoundError:
            return None
        if not self.is_verified(shard, os.fstat(file)):
            os.close(file)
            return None
        self._files[shard] = file
        return file

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_files": {}, "_process": -1}


def copy_state(copy: os.stat_result) -> str:
    """What changes when a file does: its size in bytes and its time of change in nanoseconds."""
    return f"{copy.st_size} {copy.st_mtime_ns}"


def write_whole(path: Path, blocks: Iterable[bytes]) -> None:
    """Write a file that has its name when all `blocks` have come."""
    with whole_file(path) as file:
        for block in blocks:
            file.write(block)
