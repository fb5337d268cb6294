"""Shards that lie elsewhere (s3://, gs://, hf://, http://): read through fsspec, with a local cache of bounded size.

    folder, reader = open_remote("s3://bucket/encoded", cache_folder=Path("/local/cache"))
    with ShardsAhead(reader, order, dataset.index.shard, consumed, limit_bytes=50 * 10**9) as ahead:
        ahead.at(place)                 # from time to time; copies the shards that come next, drops those that were used

A sample is read from the local copy of its shard when there is one, and else from the remote by its byte range. So the
cache only makes reading faster: whatever is in it, the same bytes come out, and nothing ever waits for a whole shard.
What is needed next is known, because the order of training is (train/order.py).
"""

import hashlib
import os
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import numpy as np

from data_prep.shards import EMPTY_PROMPT, INDEX, MANIFEST, Manifest, read_manifest
from train.order import Order

TRIES = 4  # of one remote read; networks have moments
BLOCK = 8 << 20  # bytes of a shard that are copied at once
LOOK_AHEAD = 1024  # micro-batches of the plan that are looked through at once


def is_remote(folder: str | Path) -> bool:
    return "://" in str(folder)


def open_remote(url: str, cache_folder: Path) -> tuple[Path, "RemoteReader"]:
    """Copy manifest, index and empty prompt of a remote data set into a folder of its own under `cache_folder`.

    Returns that folder and the reader of its samples. Raises FileNotFoundError when there is no finished data set.
    """
    folder = cache_folder / hashlib.sha256(url.encode()).hexdigest()[:16]
    folder.mkdir(parents=True, exist_ok=True)
    remote = Remote(url)
    try:
        manifest = remote.read(MANIFEST)
    except FileNotFoundError:
        raise FileNotFoundError(f"{url} holds no {MANIFEST}: remote data sets must be finished and indexed") from None
    changed = not (folder / MANIFEST).is_file() or (folder / MANIFEST).read_bytes() != manifest
    for name in (INDEX, EMPTY_PROMPT):
        if changed or not (folder / name).is_file():
            try:
                write_whole(folder / name, [remote.read(name)])
            except FileNotFoundError:
                if name == INDEX:
                    raise FileNotFoundError(f"{url} holds no {INDEX}: remote data sets must be indexed") from None
    if changed:
        for stale in folder.glob("*.tar"):
            stale.unlink()
    write_whole(folder / MANIFEST, [manifest])
    return folder, RemoteReader(url, folder, read_manifest(folder))


class Remote:
    """The files of a remote folder. Each process makes a connection of its own: fsspec's don't survive a fork."""

    def __init__(self, url: str) -> None:
        self.url = url.rstrip("/")
        self._connection: tuple[int, Any] | None = None

    def read(self, name: str, start: int | None = None, end: int | None = None) -> bytes:
        """The bytes [start, end) of a file, tried TRIES times. Raises FileNotFoundError at once, other OSErrors last."""
        for attempt in range(1, TRIES + 1):
            try:
                return self._filesystem().cat_file(f"{self.url}/{name}", start=start, end=end)
            except FileNotFoundError:
                raise
            except OSError:
                if attempt == TRIES:
                    raise
                self._connection = None
                time.sleep(0.1 * 4**attempt)
        raise AssertionError

    def _filesystem(self) -> Any:
        import fsspec

        if self._connection is None or self._connection[0] != os.getpid():
            filesystem = fsspec.filesystem(self.url.partition("://")[0], skip_instance_cache=True)
            self._connection = (os.getpid(), filesystem)
        return self._connection[1]

    def __getstate__(self) -> dict[str, Any]:
        return {"url": self.url, "_connection": None}


class RemoteReader:
    """Reads members like data_prep.shards.ShardReader does: locally where the shard has been copied, else remotely."""

    def __init__(self, url: str, folder: Path, manifest: Manifest) -> None:
        self.remote, self.folder, self.manifest = Remote(url), folder, manifest
        self.names = [shard.name for shard in manifest.shards]
        self._files: dict[int, int] = {}
        self._process = os.getpid()

    def read(self, shard: int, offset: int, size: int) -> bytes:
        """`size` bytes at `offset` of a shard. Raises OSError when the remote doesn't answer, ValueError when cut short."""
        file = self._open(shard)
        if file is not None:
            data = os.pread(file, int(size), int(offset))
        else:
            data = self.remote.read(self.names[shard], int(offset), int(offset) + int(size))
        if len(data) != size:
            raise ValueError(f"{self.remote.url}/{self.names[shard]} ends before byte {offset + size}")
        return data

    def _open(self, shard: int) -> int | None:
        if self._process != os.getpid():  # forked: the parent's descriptors are not ours
            self._files, self._process = {}, os.getpid()
        if shard in self._files:
            return self._files[shard]
        try:
            file = os.open(self.folder / self.names[shard], os.O_RDONLY)
        except FileNotFoundError:
            return None
        for other, descriptor in list(self._files.items()):
            if os.fstat(descriptor).st_nlink == 0:  # dropped from the cache; the disk gets its space back at the close
                os.close(descriptor)
                del self._files[other]
        self._files[shard] = file
        return file

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_files": {}, "_process": -1}


class ShardsAhead:
    """A thread that keeps the shards that are needed next in the local folder, `limit_bytes` of them at most.

    One process a node is enough. A shard whose bytes don't match the manifest is not kept, and said.
    """

    def __init__(
        self,
        reader: RemoteReader,
        order: Order,
        shard_of: np.ndarray,
        consumed: int,
        limit_bytes: int,
        say: Callable[[str], None] = print,
    ) -> None:
        self.reader, self.order, self.shard_of, self.limit_bytes, self.say = reader, order, shard_of, limit_bytes, say
        self._place, self._moved, self._stop = consumed, threading.Event(), False
        self._failed: set[int] = set()
        self._thread = threading.Thread(target=self._run, name="shards-ahead", daemon=True)
        self._thread.start()

    def at(self, place: int) -> None:
        """Training has come to this place of the global stream."""
        self._place = place
        self._moved.set()

    def close(self) -> None:
        self._stop = True
        self._moved.set()
        self._thread.join()

    def wanted(self) -> list[int]:
        """The shards that come next, in the order of their first use, as many as fit; at most two epochs ahead."""
        found: dict[int, None] = {}
        used, end = 0, self._place + 2 * self.order.length
        for start in range(self._place, end, LOOK_AHEAD):
            for shard in shards_in_order(self.order, self.shard_of, start, min(LOOK_AHEAD, end - start)):
                if shard in found:
                    continue
                used += self.reader.manifest.shards[shard].bytes
                if used > self.limit_bytes:
                    return list(found)
                found[shard] = None
            if len(found) == len(self.reader.names):
                break
        return list(found)

    def _run(self) -> None:
        while not self._stop:
            self._moved.clear()
            wanted = self.wanted()
            names = {self.reader.names[shard]: shard for shard in wanted}
            for path in self.reader.folder.glob("*.tar"):
                if path.name not in names:
                    path.unlink(missing_ok=True)
            missing = [
                s for s in wanted if s not in self._failed and not (self.reader.folder / self.reader.names[s]).exists()
            ]
            if missing:
                self._copy(missing[0])
            else:
                self._moved.wait()

    def _copy(self, shard: int) -> None:
        facts = self.reader.manifest.shards[shard]
        digest = hashlib.sha256()

        def blocks() -> Iterator[bytes]:
            for start in range(0, facts.bytes, BLOCK):
                if self._stop:
                    raise InterruptedError
                block = self.reader.remote.read(facts.name, start, min(start + BLOCK, facts.bytes))
                digest.update(block)
                yield block
            if digest.hexdigest() != facts.sha256:
                raise OSError(f"{facts.name} doesn't match the sha256 in the manifest")

        try:
            write_whole(self.reader.folder / facts.name, blocks())
        except InterruptedError:
            pass
        except OSError as error:
            self._failed.add(shard)
            self.say(f"{self.reader.remote.url}: shard not cached, its samples are read remotely: {error}")

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def shards_in_order(order: Order, shard_of: np.ndarray, start: int, count: int) -> list[int]:
    """The distinct shards of `count` micro-batches from place `start`, in the order of their first use."""
    epoch, place = divmod(start, order.length)
    virtual = order.plan(epoch)[place : place + count]
    if len(virtual) < count:
        virtual = np.concatenate([virtual, order.plan(epoch + 1)[: count - len(virtual)]])
    shards = shard_of[virtual.ravel() % order.samples]
    _, first = np.unique(shards, return_index=True)
    return [int(shard) for shard in shards[np.sort(first)]]


def write_whole(path: Path, blocks: Iterable[bytes]) -> None:
    """Write a file under a temporary name and rename it when all `blocks` have come."""
    partial = path.with_name(f".partial-{path.name}.{os.getpid()}")
    try:
        with open(partial, "wb") as file:
            for block in blocks:
                file.write(block)
        partial.rename(path)
    finally:
        partial.unlink(missing_ok=True)
