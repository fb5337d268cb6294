"""Processes that probe and store images, in order, and survive an image that kills its process.

What a worker imports is kept small: no pyarrow, and torch only when it resizes.
"""

from __future__ import annotations

import collections
import hashlib
import itertools
import multiprocessing
import multiprocessing.connection
import os
import signal
import threading
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from typing import Any, Self

from data_prep.images import convert as images
from data_prep.images import resizing
from data_prep.images.buckets import Placement
from data_prep.images.convert import BadImage, ImageOptions, Stored
from data_prep.sources.found_input import Input


@dataclass(frozen=True)
class Probe:
    """What the header of a usable image says."""

    placement: Placement
    copied: bool  # as far as the header tells
    digest: str = ""  # for finding duplicates


@dataclass(frozen=True)
class Job:
    """What all processes know."""

    base: bytes  # folder
    options: ImageOptions
    duplicates: str = "none"  # none | exact | perceptual: which digest a probe computes


def probe(job: Job, item: Input) -> Probe | BadImage:
    """Judge one input by its header."""
    try:
        with _open(job, item) as file:
            if item.offset or job.duplicates != "none":
                data = _read(file.fileno(), item)
                return _probe(job, data)
            header = images.read_header(file, job.options)
            placement = images.judge(header.width, header.height, header.frames, job.options)
            return Probe(placement, images.looks_copied(header, placement, job.options))
    except BadImage as error:
        return error
    except OSError as error:
        return BadImage("failed", "unreadable", error.strerror or str(error))


def _probe(job: Job, data: bytes) -> Probe:
    import io

    header = images.read_header(io.BytesIO(data), job.options)
    placement = images.judge(header.width, header.height, header.frames, job.options)
    digest = ""
    if job.duplicates == "exact":
        digest = hashlib.sha256(data).hexdigest()
    elif job.duplicates == "perceptual":
        digest = images.perceptual_hash(data, job.options)
    return Probe(placement, images.looks_copied(header, placement, job.options), digest)


def store(job: Job, item: Input) -> tuple[Stored, str] | BadImage:
    """Read and convert one input; also the sha256 of its source bytes."""
    try:
        with _open(job, item) as file:
            if item.offset == 0 and os.fstat(file.fileno()).st_size < item.size:
                raise BadImage("failed", "changed since the plan", "the file is shorter now")
            data = _read(file.fileno(), item)
        return images.store(data, job.options), hashlib.sha256(data).hexdigest()
    except BadImage as error:
        return error
    except OSError as error:
        return BadImage("failed", "unreadable", error.strerror or str(error))


def digest(job: Job, item: Input) -> str | BadImage:
    """sha256 of one input's source bytes."""
    try:
        with _open(job, item) as file:
            return hashlib.sha256(_read(file.fileno(), item)).hexdigest()
    except BadImage as error:
        return error
    except OSError as error:
        return BadImage("failed", "unreadable", error.strerror or str(error))


def _open(job: Job, item: Input) -> Any:
    return open(os.path.join(job.base, item.file), "rb", buffering=1 << 13)


def _read(file: int, item: Input) -> bytes:
    data = os.pread(file, item.size, item.offset)
    if len(data) != item.size:
        raise BadImage("failed", "changed since the plan", f"{len(data)} bytes where there were {item.size}")
    return data


# ── processes ────────────────────────────────────────────────────────────────────────────────────────────────────────

Work = Callable[[Job, Input], Any]


def _start() -> None:
    """First thing in a worker."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches all processes; the parent answers it
    images.one_thread()
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    """A worker waits for tasks for ever; when its parent was killed, nobody would end it."""
    parent = multiprocessing.parent_process()
    assert parent is not None
    multiprocessing.connection.wait([parent.sentinel])
    os._exit(1)


def _run_chunk(function: Work, job: Job, chunk: list[Input]) -> list[Any]:
    return [function(job, item) for item in chunk]


class Workers:
    """`count` processes (0: this one) that map a function over inputs, in order, with a bounded number in flight."""

    def __init__(self, count: int) -> None:
        self.count = count
        self._pool = self._new_pool(count) if count else None
        if not count:
            images.one_thread()

    def resize_backend(self) -> str:
        """Which kernel the workers can resize with; asked there, so that this process needn't import torch."""
        return self._pool.submit(resizing.resize_backend).result() if self._pool else resizing.resize_backend()

    def map(self, function: Work, job: Job, items: Iterable[Input], chunk: int) -> Iterator[Any]:
        """Yield function(job, item) for each item, in order.

        An item whose process dies (a codec that crashes, the kernel's out-of-memory killer) gives a BadImage.
        """
        if self._pool is None:
            for item in items:
                yield function(job, item)
            return
        pending: collections.deque[tuple[list[Input], Future[list[Any]]]] = collections.deque()
        iterator = iter(items)
        while True:
            while len(pending) < 2 * self.count + 2 and (batch := list(itertools.islice(iterator, chunk))):
                pending.append((batch, self._submit(function, job, batch)))
            if not pending:
                return
            batch, future = pending.popleft()
            try:
                yield from future.result()
            except BrokenProcessPool:
                yield from self._one_by_one(function, job, batch)
                self._pool = self._new_pool(self.count)
                pending = collections.deque((batch, self._submit(function, job, batch)) for batch, _ in pending)

    def _submit(self, function: Work, job: Job, batch: list[Input]) -> Future[list[Any]]:
        assert self._pool is not None
        try:
            return self._pool.submit(_run_chunk, function, job, batch)
        except BrokenProcessPool as error:  # noticed before its result was asked for: keep the order, handle it there
            broken: Future[list[Any]] = Future()
            broken.set_exception(error)
            return broken

    def _one_by_one(self, function: Work, job: Job, batch: list[Input]) -> Iterator[Any]:
        """A chunk that was in flight when a process died, each item in a process whose death shows which it was."""
        pool = self._new_pool(1)
        for item in batch:
            try:
                yield pool.submit(_run_chunk, function, job, [item]).result()[0]
            except BrokenProcessPool:
                yield BadImage("failed", "killed its process", "a decoder crashed, or memory ran out")
                pool = self._new_pool(1)
        pool.shutdown()

    def _new_pool(self, count: int) -> ProcessPoolExecutor:
        # Not fork: the parent has threads (pyarrow, tqdm), and a forked child may inherit a lock that nobody opens.
        context = multiprocessing.get_context("spawn")
        return ProcessPoolExecutor(count, mp_context=context, initializer=_start)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        if self._pool is not None:
            self._pool.shutdown(cancel_futures=True)


def usable_cores() -> int:
    """Cores that this process may run on, which under Slurm are fewer than the machine has."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
