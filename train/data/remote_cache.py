"""The local cache of a remote data set: the shards that training needs next, copied ahead, in a bounded space.

    with ShardsAhead(reader, order, dataset.index.shard, consumed, limit_bytes=50 * 10**9) as ahead:
        ahead.at(place)                 # from time to time; copies the shards that come next, drops those that were used

The cache only makes reading faster: whatever is in it, the same bytes come out (train/data/remote_shards.py), and nothing
ever waits for a whole shard. What is needed next is known, because the order of training is (train/data/sample_order.py).
"""

import errno
import fcntl
import hashlib
import os
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from types import TracebackType
from typing import IO, Self

import numpy as np

from files.atomic_files import PARTIAL, whole_file, write_file
from files.shown import shown, shown_bytes
from train.data.prior_order import PriorOrder
from train.data.remote_shards import RemoteReader, copy_state
from train.data.sample_order import Order

BLOCK = 8 << 20  # bytes of a shard that are copied at once
LOOK_AHEAD = 1024  # micro-batches of the plan that are looked through at once
FETCHES = 2  # of a shard that comes wrong
LOCK = ".lock"
LOCK_SECONDS = 1.0  # between looks whether another run still fills the cache


class WrongBytes(ValueError):
    """A shard is not what the manifest says."""


class ShardsAhead:
    """A thread that keeps the shards that are needed next in the local folder, `limit_bytes` of them at most.

    One process a node is enough, and while it runs no other changes this folder: a second run reads what is there. A
    shard whose bytes don't match the manifest is fetched once more; then all readers hear that it is wrong. One that can't
    be copied is read remotely. Both are said.
    """

    def __init__(
        self,
        reader: RemoteReader,
        order: Order | PriorOrder,
        shard_of: np.ndarray,
        consumed: int,
        limit_bytes: int,
        say: Callable[[str], None] = print,
    ) -> None:
        self.reader, self.order, self.shard_of, self.limit_bytes, self.say = reader, order, shard_of, limit_bytes, say
        self._place, self._moved, self._stop = consumed, threading.Event(), False
        self._failed: set[int] = set()
        self._lock = self._opened_lock()
        self._thread = threading.Thread(target=self._run, name="shards-ahead", daemon=True)
        self._thread.start()

    def at(self, place: int) -> None:
        """Training has come to this place of the global stream."""
        self._place = place
        self._moved.set()

    def close(self) -> None:
        self._stop = True
        self._moved.set()
        self._thread.join(2 * LOCK_SECONDS)  # it may be waiting for the network; nothing is lost with it
        if self._lock is not None:
            fcntl.flock(self._lock, fcntl.LOCK_UN)  # forked readers have the same file open
            self._lock.close()

    def wanted(self) -> list[int]:
        """The shards that come next, in the order of their first use, as many as fit; at most two epochs ahead."""
        found: dict[int, None] = {}
        used, end = 0, self._place + int(2 * self.order.length)
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
        if not self._alone():
            return
        for pattern in (f"{PARTIAL}*.tar.*", "*.tar.wrong"):  # of a run that was killed while copying; it may be mended
            for left_over in self.reader.folder.glob(pattern):
                left_over.unlink(missing_ok=True)
        while not self._stop:
            self._moved.clear()
            wanted = self.wanted()
            names = {self.reader.names[shard]: shard for shard in wanted}
            for path in self.reader.folder.glob("*.tar"):
                if path.name not in names:
                    path.unlink(missing_ok=True)
                    path.with_name(f"{path.name}.verified").unlink(missing_ok=True)
            missing = [shard for shard in wanted if shard not in self._failed and not self._is_here(shard)]
            if missing:
                self._copy(missing[0])
            else:
                self._moved.wait()

    def _opened_lock(self) -> IO[str] | None:
        """None, and a line, where the folder is read-only: what others have filled can still be read."""
        try:
            return (self.reader.folder / LOCK).open("w")
        except OSError as error:
            if error.errno not in (errno.EROFS, errno.EACCES, errno.EPERM):
                raise
            self.say(
                f"the cache {shown(self.reader.folder)} can't be written ({error.strerror}): its shards are read, others' "
                "samples remotely (--data_cache_path names another)"
            )
            return None

    def _alone(self) -> bool:
        """Wait until no other run fills this folder; False where it is read-only, or when told to stop before."""
        told = False
        if self._lock is None:
            return False
        while not self._stop:
            try:
                fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                return True
            except OSError as error:
                if not told:
                    self.say(
                        f"another run fills the cache {self.reader.folder}, this one only reads it ({error.strerror})"
                    )
                told = True
                time.sleep(LOCK_SECONDS)
        return False

    def _is_here(self, shard: int) -> bool:
        try:
            return self.reader.is_verified(shard, (self.reader.folder / self.reader.names[shard]).stat())
        except OSError:
            return False

    def _copy(self, shard: int) -> None:
        name, wrong = self.reader.names[shard], ""
        try:
            for _ in range(FETCHES):
                wrong = self._fetch(shard)
                if not wrong:
                    return
        except InterruptedError:
            return
        except (OSError, ValueError) as error:
            if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
                self._make_do()
                return
            self._failed.add(shard)
            self.say(f"{self.reader.remote.url}: shard not cached, its samples are read remotely: {error}")
            return
        self._failed.add(shard)
        with suppress(OSError):
            self.reader.wrong_mark(shard).touch()
        self.say(
            f"{self.reader.remote.url}/{name}, fetched {FETCHES} times, is not what the manifest says: {wrong}; its "
            "samples are broken from here on (those that were read before it was copied could not be compared)"
        )

    def _make_do(self) -> None:
        """The disk is full: from now on the cache is as large as what lies in it, and goes on with that."""
        with suppress(OSError):
            self.limit_bytes = sum(path.stat().st_size for path in self.reader.folder.glob("*.tar"))
        self.say(
            f"warning: the disk of the cache {self.reader.folder} is full: it keeps {shown_bytes(self.limit_bytes)} of the "
            "shards that come next, the others' samples are read remotely (--data_cache_path, --data_cache_gb)"
        )

    def _fetch(self, shard: int) -> str:
        """Copy a shard, compare it, and only then give it its name. Returns what is wrong with it, or nothing.

        Raises InterruptedError at the end of the run, OSError or ValueError where it can't be copied.
        """
        facts, folder = self.reader.manifest.shards[shard], self.reader.folder
        digest = hashlib.sha256()

        def blocks() -> Iterator[bytes]:
            for start in range(0, facts.bytes, BLOCK):
                if self._stop:
                    raise InterruptedError
                end = min(start + BLOCK, facts.bytes)
                block = self.reader.remote.read(facts.name, start, end)
                if len(block) < end - start:
                    raise WrongBytes(f"it ends before byte {end} of {facts.bytes}")
                digest.update(block)
                yield block
            if digest.hexdigest() != facts.sha256:
                raise WrongBytes(f"it doesn't match the sha256 {facts.sha256}")

        try:
            with whole_file(folder / facts.name) as file:
                for block in blocks():
                    file.write(block)
                file.flush()
                state = copy_state(os.fstat(file.fileno()))  # the rename keeps both
                write_file(self.reader.verified_mark(shard), state)
        except WrongBytes as error:
            return str(error)
        return ""

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def shards_in_order(order: Order | PriorOrder, shard_of: np.ndarray, start: int, count: int) -> list[int]:
    """The distinct shards of `count` micro-batches from place `start`, in the order of their first use.

    `shard_of` each sample; below 0: of none that is asked about.
    """
    shards = shard_of[order.micro_batches(start, count).ravel() % order.samples]
    found, first = np.unique(shards, return_index=True)
    return [int(shard) for shard in shards[np.sort(first[found >= 0])]]
