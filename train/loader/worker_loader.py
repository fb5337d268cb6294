"""What an indexed loader and a stream share: worker processes, errors by policy, the count of what was consumed, the device.

train/loader/indexed_loader.py and train/loader/webdataset_stream.py say what the workers read.
"""

import atexit
import signal
import threading
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from types import TracebackType
from typing import Any, Literal, Self

import torch
from torch.utils.data import DataLoader, Dataset, Sampler

from train.data.batch import ATTEMPTS, Batch

END_SECONDS = 2.0  # for the readers to end by themselves
PREFETCH = 4  # micro-batches each worker reads ahead
JOB_SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT, signal.SIGHUP)


@dataclass(frozen=True, kw_only=True)
class Reading:
    """How batches are read, whatever they are read from.

    Attributes:
        caption_dropout: share of samples that get the empty caption.
        rank, world, accumulation: whose micro-batches these are; an optimizer step takes world · accumulation of them.
        consumed: micro-batches that all ranks together had consumed (from `state()` of an earlier run).
        num_workers: reading processes; 0 = read in this one.
        text_padding: pad prompts to a multiple of this many tokens.
        masks: a stream's samples come with their masks (an indexed set knows it itself).
        on_broken_sample: `skip` names the sample, counts it and goes on with another; `stop` raises BrokenSample.
        say: where a broken sample is named (once for each sample and run).
    """

    caption_dropout: float = 0.0
    rank: int = 0
    world: int = 1
    accumulation: int = 1
    consumed: int = 0
    num_workers: int = 0
    device: torch.device | str = "cpu"
    text_padding: int = 1
    masks: bool = False
    on_broken_sample: Literal["skip", "stop"] = "skip"
    say: Callable[[str], None] = print

    @property
    def attempts(self) -> int:
        """So many broken samples in a row are passed over."""
        return 0 if self.on_broken_sample == "stop" else ATTEMPTS


DEFAULTS = Reading()


class Batches:
    """Micro-batches of one rank on `device`, endlessly.

    Args:
        source: what runs in the workers; gives a Batch, or the exception that ends the run (returned, so that its one line
            reaches the user without a worker's traceback).
        tasks: what `source` is asked for, one after the other; None for a source that is iterated over.
        order: what determines the order; goes into the state.
        length: micro-batches an epoch; 0 where nobody knows.
        broken_are: what became of broken samples, for the message.

    Attributes:
        consumed: micro-batches of all optimizer steps that were taken; never what workers have read ahead.
        broken: samples replaced or left out so far in the batches handed out.
    """

    def __init__(
        self,
        source: Dataset[Any],
        tasks: Sampler[Any] | None,
        reading: Reading,
        order: dict[str, Any],
        length: float,
        broken_are: str,
    ) -> None:
        self.consumed, self.broken, self.reading = reading.consumed, 0, reading
        self._order, self._length, self._broken_are, self._named = order, length, broken_are, set[str]()
        device = torch.device(reading.device)
        with signals_held_back():  # a worker must not die of one before it can ignore it
            self._batches: Iterator[Batch | Exception] = iter(
                DataLoader(
                    source,
                    sampler=tasks,
                    batch_size=None,
                    collate_fn=as_it_is,
                    num_workers=reading.num_workers,
                    prefetch_factor=PREFETCH if reading.num_workers else None,
                    worker_init_fn=leave_signals_to_the_parent,
                    pin_memory=device.type == "cuda",
                )
            )
        end_workers_at_exit(self._batches)
        checked = self._checked()
        self._stream: Iterator[Batch] = copied_ahead(checked, device) if device.type == "cuda" else checked

    def __iter__(self) -> Iterator[Batch]:
        """Goes on where the last iteration left off."""
        return self._stream

    def _checked(self) -> Iterator[Batch]:
        for batch in self._batches:
            if isinstance(batch, Exception):
                raise batch
            self.arrived(batch)
            for message in batch.broken:
                self.broken += 1
                name = message.partition(": ")[0]  # the sample and its shard
                if name not in self._named:
                    self._named.add(name)
                    self.reading.say(f"broken sample {self._broken_are}: {message}")
            yield batch

    def arrived(self, batch: Batch) -> None:
        """Called with each batch before it is handed out (on CUDA: before it is copied there)."""

    def stepped(self) -> None:
        """Count one optimizer step of all ranks."""
        self.consumed += self.reading.world * self.reading.accumulation

    def state(self) -> dict[str, Any]:
        """The position and what it is a position in; a checkpoint's client state. The same on every rank."""
        return {"consumed": self.consumed, "order": self._order}

    @property
    def epoch(self) -> float:
        """Epochs consumed; 0 where their length is unknown."""
        return self.consumed / self._length if self._length else 0.0

    def close(self) -> None:
        """Stop the workers."""
        self._stream = iter(())
        shut_down(self._batches)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


@contextmanager
def signals_held_back() -> Iterator[None]:
    """Signals to the job wait meanwhile; processes started meanwhile keep them waiting."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, JOB_SIGNALS)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def leave_signals_to_the_parent(worker: int) -> None:
    """Slurm and Ctrl-C signal every process of a job; a reader that died of it would take the last checkpoint along."""
    for number in JOB_SIGNALS:
        signal.signal(number, signal.SIG_IGN)
    die_with_the_parent()


def die_with_the_parent() -> None:
    """When the rank is killed, so is this reader (Linux, prctl(2)); elsewhere it ends when it next asks for a task."""
    import ctypes

    with suppress(OSError, AttributeError):
        ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG


def shut_down(batches: Any) -> None:
    """End the readers: those of torch's iterator over processes. Those that wait for a dead server are killed.

    Torch itself waits ten seconds for each of them, one after the other, and ends with a SIGTERM, which they ignore; the
    launchers' patience with the whole rank is 30 seconds.
    """
    if not hasattr(batches, "_shutdown_workers"):
        return

    def kill() -> None:
        for worker in getattr(batches, "_workers", ()):
            if worker.is_alive():
                worker.kill()

    timer = threading.Timer(END_SECONDS, kill)
    timer.daemon = True
    try:
        timer.start()
    except RuntimeError:  # at the interpreter's end Python 3.12 starts no thread any more
        kill()
    with suppress(RuntimeError):  # torch's word on a reader that was killed
        batches._shutdown_workers()
    timer.cancel()
    kill()


def end_workers_at_exit(batches: Any) -> None:
    """Tell workers to end before multiprocessing sends them a SIGTERM, which they ignore, and waits for them forever."""
    alive = weakref.ref(batches)
    atexit.register(lambda: shut_down(alive()))


def as_it_is(batch: Any) -> Any:
    """Instead of the DataLoader's own conversion."""
    return batch


def copied_ahead(batches: Iterator[Batch], device: torch.device) -> Iterator[Batch]:
    """Pinned batches on a CUDA device; the next one is copied on a side stream while this one is worked on."""
    stream = torch.cuda.Stream(device)

    def start_copy() -> tuple[Batch, torch.cuda.Event]:
        with torch.cuda.stream(stream):
            batch = next(batches).to(device, non_blocking=True)
            return batch, stream.record_event()

    ahead = start_copy()
    while True:
        batch, copied = ahead
        ahead = start_copy()
        current = torch.cuda.current_stream(device)
        current.wait_event(copied)
        # The memory belongs to the side stream's pool: keep it until the work that uses it is done.
        for tensor in batch.tensors():
            if tensor.is_cuda:  # σ stays on the CPU
                tensor.record_stream(current)
        yield batch
