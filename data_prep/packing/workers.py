"""Processes that probe and store images, in order, and survive an image that kills its process.

What a worker imports is kept small: no pyarrow, and torch only when it resizes.
"""

from __future__ import annotations

import collections
import contextlib
import fcntl
import hashlib
import io
import multiprocessing
import multiprocessing.connection
import os
import signal
import tempfile
import threading
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, replace
from typing import IO, Any, Self

from data_prep.images import convert, header, masks, resizing
from data_prep.images.buckets import Placement, places
from data_prep.images.convert import Stored
from data_prep.images.header import ImageOptions
from data_prep.images.skip_reasons import (
    CHANGED,
    FAILED,
    KILLED,
    MASK_UNUSABLE,
    NOT_REGULAR,
    SOURCE_UNUSABLE,
    UNREADABLE,
    BadImage,
    of_decoder,
)
from data_prep.shard_format.tar_members import sparse_content
from data_prep.sources.found_input import ROW, SPARSE, Input, MaskFile, Partner
from data_prep.sources.parquet_images import with_bytes
from data_prep.sources.regular_files import NotRegular, open_regular

# An image that takes more than this to decode waits until no other process decodes such a one: workers together take
# at most their number times this, and one image more.
LARGE_BYTES = 320_000_000
CHUNK_BYTES = 8_000_000  # of images that travel to a worker in one task


@dataclass(frozen=True)
class Probe:
    """What the header of a usable image says."""

    placement: Placement
    copied: bool  # as far as the header tells
    memory: int  # bytes that decoding it takes at its peak, about
    digest: str = ""  # for finding duplicates
    sources: tuple[Placement, ...] = ()  # of a pair
    others: tuple[Probe, ...] = ()  # further sizes that the same image is stored at
    area: int = 0  # of the target that this size is for (buckets.places)
    masked: bool = False
    size: tuple[int, int] = (0, 0)  # width and height, upright
    orientation: int = 1  # EXIF's


@dataclass(frozen=True)
class Job:
    """What all processes know."""

    base: bytes  # folder
    options: ImageOptions
    duplicates: str = "none"  # none | exact | perceptual: which digest a probe computes
    image_column: str | None = None  # of parquet files


def probe(job: Job, item: Input) -> Probe | BadImage:
    """Judge one input by its header. Whatever goes wrong is a BadImage: no decoder's exception ends a run."""
    try:
        options = job.options.of_target() if item.sources else job.options
        sources = [_probe_partner(job, partner) for partner in item.sources]
        if item.kind or item.offset or job.duplicates != "none":
            found = _probe(job, options, io.BytesIO(data := _content(job, item)), data)
        else:
            with open_regular(os.path.join(job.base, item.file), buffering=1 << 13) as file:
                found = _probe(job, options, file, b"")
        if item.mask is not None:
            found = _masked(found, _check_mask(job, item, found))
        if not sources:
            return found
        memory = max(found.memory, *(each.memory for each in sources))
        digest = hashlib.sha256("".join([found.digest, *(each.digest for each in sources)]).encode()).hexdigest()
        if job.duplicates == "perceptual":  # compared bit by bit; an edit's target tells it well enough
            digest = found.digest
        copied = all(each.copied for each in sources)
        placements = tuple(each.placement for each in sources)

        def of_pair(size: Probe) -> Probe:
            told = digest if size.digest else ""
            return replace(size, memory=memory, copied=size.copied and copied, digest=told, sources=placements)

        return replace(of_pair(found), others=tuple(map(of_pair, found.others)))
    except BaseException as error:
        return _failure(error)


def _probe_partner(job: Job, partner: Partner) -> Probe:
    """Of a source image. Raises BadImage, which names it."""
    try:
        options, data = job.options.of_source(), b""
        if job.duplicates == "exact":
            data = _content_of_partner(job, partner)
        with open_regular(os.path.join(job.base, partner.file), buffering=1 << 13) as file:
            return _probe(job, options, file, data, perceptual=False)
    except BaseException as error:
        raise _of_partner(error, partner) from None


def _check_mask(job: Job, item: Input, image: Probe) -> int:
    """Whether the mask is of its image, by their headers; bytes that decoding it takes. Raises BadImage, which names it."""
    mask = item.mask
    assert mask is not None
    try:
        if mask.kind or mask.offset:
            found = header.read_header(io.BytesIO(_content_of_mask(job, mask)), job.options)
        else:
            with open_regular(os.path.join(job.base, mask.file), buffering=1 << 13) as file:
                found = header.read_header(file, job.options)
        try:
            masks.orientation_of(found, image.size, image.orientation)
        except BadImage:  # for good, if it isn't that EXIF data stands behind the pixels
            masks.check_decoded(_content_of_mask(job, mask), _content(job, item), job.options)
        return found.memory
    except BaseException as error:
        raise _of_mask(error, mask) from None


def _masked(found: Probe, memory: int) -> Probe:
    """The image as one with a mask, which takes so much to decode, at all its sizes."""
    others = tuple(_masked(other, memory) for other in found.others)
    return replace(found, masked=True, memory=max(found.memory, memory), others=others)


def _store_mask(job: Job, mask: MaskFile, stored: Stored, options: ImageOptions) -> masks.StoredMask:
    try:
        data = _content_of_mask(job, mask)
        size = stored.original_width, stored.original_height
        found = masks.store_mask(data, size, stored.orientation, stored.placement, options, _turn)
        return replace(found, sha256=hashlib.sha256(data).hexdigest())
    except BaseException as error:
        raise _of_mask(error, mask) from None


def _of_mask(error: BaseException, mask: MaskFile) -> BadImage:
    bad = _failure(error)
    return BadImage(bad.status, MASK_UNUSABLE, f"{mask.path}: {bad}")


def _content_of_mask(job: Job, mask: MaskFile) -> bytes:
    return _content(job, Input(mask.path, mask.file, mask.offset, mask.size, None, kind=mask.kind))


def _of_partner(error: BaseException, partner: Partner) -> BadImage:
    bad = _failure(error)
    return BadImage(bad.status, SOURCE_UNUSABLE, f"{partner.path}: {bad}")


def _content_of_partner(job: Job, partner: Partner) -> bytes:
    return _content(job, Input(partner.path, partner.file, 0, partner.size, None))


def _probe(job: Job, options: ImageOptions, file: Any, data: bytes, perceptual: bool = True) -> Probe:
    found = header.read_header(file, options)
    header.judge(found.width, found.height, found.frames, options)
    digest = ""
    if job.duplicates == "exact":
        digest = hashlib.sha256(data).hexdigest()
    elif job.duplicates == "perceptual" and perceptual:
        with _turn(found.memory):
            digest = convert.perceptual_hash(data, options)
    size, masked = (found.width, found.height), options.mask_from_alpha and found.alpha
    facts = found.memory, digest
    sizes = [
        Probe(each, header.looks_copied(found, each, options), *facts, (), (), area, masked, size, found.orientation)
        for area, each in places(*size, options.buckets)
    ]
    return replace(sizes[0], others=tuple(sizes[1:]))


def store(job: Job, item: Input) -> tuple[Stored, str] | BadImage:
    """Read and convert one input; also the sha256 of its source bytes. Whatever goes wrong is a BadImage."""
    try:
        data = _content(job, item)
        options = (job.options.of_target() if item.sources else job.options).at(item.area)
        stored = convert.store(data, options, _turn)
        if item.mask is not None:
            stored = replace(stored, mask=_store_mask(job, item.mask, stored, options))
        sources = tuple(_store_partner(job, partner) for partner in item.sources)
        return replace(stored, sources=sources) if sources else stored, hashlib.sha256(data).hexdigest()
    except BaseException as error:
        return _failure(error)


def _store_partner(job: Job, partner: Partner) -> Stored:
    try:
        data = _content_of_partner(job, partner)
        stored = convert.store(data, job.options.of_source(), _turn)
        return replace(stored, sha256=hashlib.sha256(data).hexdigest())
    except BaseException as error:
        raise _of_partner(error, partner) from None


def digest(job: Job, item: Input) -> str | BadImage:
    """sha256 of one input's source bytes; of a pair those of all its images, and that of a mask's, with commas between them."""
    try:
        contents = [_content(job, item), *(_content_of_partner(job, partner) for partner in item.sources)]
        if item.mask is not None:
            contents.append(_content_of_mask(job, item.mask))
        return ",".join(hashlib.sha256(content).hexdigest() for content in contents)
    except BaseException as error:
        return _failure(error)


def _failure(error: BaseException) -> BadImage:
    if isinstance(error, NotRegular):
        return BadImage(FAILED, NOT_REGULAR, str(error.strerror))
    if isinstance(error, OSError) and error.filename is not None:  # of a file, not of a decoder
        return BadImage(FAILED, UNREADABLE, error.strerror or str(error))
    return of_decoder(error)


def _content(job: Job, item: Input) -> bytes:
    """All bytes of one image. Raises BadImage when the file isn't what the plan saw."""
    if item.problem:
        raise BadImage(FAILED, *item.problem)
    if item.kind == ROW:
        assert item.data is not None, "with_bytes comes before a worker"
        return item.data
    with open_regular(os.path.join(job.base, item.file), buffering=1 << 13) as file:
        if item.kind == SPARSE:
            return sparse_content(file, item.offset)
        return _read(file.fileno(), item)


def _read(file: int, item: Input) -> bytes:
    data = os.pread(file, item.size, item.offset)
    if len(data) != item.size:
        raise BadImage(FAILED, CHANGED, f"{len(data)} bytes where there were {item.size}: the file is shorter now")
    return data


# ── processes ────────────────────────────────────────────────────────────────────────────────────────────────────────

Work = Callable[[Job, Input], Any]


_turn_file: IO[bytes] | None = None  # in workers: the file whose lock is the right to decode a large image


def _start(turn_file: str) -> None:
    """First thing in a worker."""
    global _turn_file
    _turn_file = open(turn_file, "rb")  # noqa: SIM115
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches all processes; the parent answers it
    convert.one_thread()
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    """A worker waits for tasks for ever; when its parent was killed, nobody would end it."""
    parent = multiprocessing.parent_process()
    assert parent is not None
    multiprocessing.connection.wait([parent.sentinel])
    os._exit(1)


@contextlib.contextmanager
def _turn(memory: int) -> Iterator[None]:
    """Large images one at a time. A file's lock, because the kernel opens it when its process is killed."""
    if memory <= LARGE_BYTES or _turn_file is None:
        yield
        return
    fcntl.flock(_turn_file, fcntl.LOCK_EX)
    try:
        yield
    finally:
        fcntl.flock(_turn_file, fcntl.LOCK_UN)


def _run_chunk(function: Work, job: Job, chunk: list[Input]) -> list[Any]:
    return [function(job, item) for item in chunk]


class Workers:
    """`count` processes (0: this one) that map a function over inputs, in order, with a bounded number in flight."""

    def __init__(self, count: int) -> None:
        self.count = count
        self._turns = tempfile.NamedTemporaryFile(prefix="make_shards-") if count else None  # noqa: SIM115
        self._pool = self._new_pool(count) if count else None
        if not count:
            convert.one_thread()

    def resize_backend(self) -> str:
        """Which kernel the workers can resize with; asked there, so that this process needn't import torch."""
        return self._pool.submit(resizing.resize_backend).result() if self._pool else resizing.resize_backend()

    def map(self, function: Work, job: Job, items: Iterable[Input], chunk: int) -> Iterator[Any]:
        """Yield function(job, item) for each item, in order.

        An item whose process dies (a codec that crashes, the kernel's out-of-memory killer) gives a BadImage.
        """
        items = with_bytes(job.base, items, job.image_column)
        if self._pool is None:
            for item in items:
                yield function(job, item)
            return
        pending: collections.deque[tuple[list[Input], Future[list[Any]]]] = collections.deque()
        iterator = iter(items)
        while True:
            while len(pending) < 2 * self.count + 2 and (batch := _chunk(iterator, chunk)):
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
                yield BadImage(FAILED, KILLED, "a decoder crashed, or memory ran out")
                pool = self._new_pool(1)
        pool.shutdown()

    def _new_pool(self, count: int) -> ProcessPoolExecutor:
        # Not fork: the parent has threads (pyarrow, tqdm), and a forked child may inherit a lock that nobody opens.
        context = multiprocessing.get_context("spawn")
        assert self._turns is not None
        return ProcessPoolExecutor(count, mp_context=context, initializer=_start, initargs=(self._turns.name,))

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        if self._pool is not None:
            self._pool.shutdown(cancel_futures=True)
        if self._turns is not None:
            self._turns.close()


def _chunk(items: Iterator[Input], count: int) -> list[Input]:
    """At most `count` of the next items; fewer where they carry their bytes along."""
    chunk: list[Input] = []
    size = 0
    while len(chunk) < count and size < CHUNK_BYTES and (item := next(items, None)) is not None:
        chunk.append(item)
        size += len(item.data or b"")
    return chunk


def usable_cores() -> int:
    """Cores that this process may run on, which under Slurm are fewer than the machine has."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
