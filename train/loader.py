"""The batches of one rank: an endless iterator with worker processes, prefetched to the device.

    with BatchLoader(dataset, order, sampling, rank=rank, world=world, consumed=state["consumed"]) as loader:
        for batch in loader:        # endless; gradient_accumulation_steps of them make an optimizer step
            …
            loader.stepped()        # after each optimizer step
        state = loader.state()      # {"consumed": …}: goes into the checkpoint

What a batch holds depends on its place in the global stream alone: not on the number of workers, ranks or accumulation
steps. The state counts optimizer steps that were taken, never what workers have read ahead.
"""

import atexit
import signal
import weakref
from collections.abc import Callable, Iterator
from functools import partial
from types import TracebackType
from typing import Any, Literal, NamedTuple, Self

import torch
from torch.utils.data import DataLoader, Dataset, Sampler

from train.cache import RemoteReader, ShardsAhead
from train.data import ATTEMPTS, Batch, BrokenSample, DrawSample, ShardDataset, make_batch
from train.flow import Draws, SigmaSampling, sample_draws
from train.order import Order, places

PREFETCH = 4  # micro-batches each worker reads ahead


class Task(NamedTuple):
    """A micro-batch to make: all that a worker has to be told."""

    place: int
    epoch: int
    indices: list[int]


class BatchLoader:
    """Micro-batches of one rank from the global stream, on `device`, endlessly.

    Args:
        sampling, caption_dropout: how a sample's σ and dropout are drawn; the seed is the order's.
        consumed: micro-batches that all ranks together had consumed (from `state()` of an earlier run).
        num_workers: reading processes; 0 = read in this one. The batches don't depend on it.
        text_multiple: pad prompts to a multiple of this many tokens.
        on_broken_sample: `skip` names the sample, counts it and takes its neighbour; `stop` raises BrokenSample.
        cache_bytes: for remote shards: keep so many bytes of those that come next in the local cache. Give it to one
            rank of each node; 0 reads every sample remotely (or from what others cached).
        say: where a broken sample is named (once for each sample and run).

    Attributes:
        broken: samples replaced so far in the batches handed out.
    """

    def __init__(
        self,
        dataset: ShardDataset,
        order: Order,
        sampling: SigmaSampling,
        *,
        caption_dropout: float = 0.0,
        rank: int = 0,
        world: int = 1,
        accumulation: int = 1,
        consumed: int = 0,
        num_workers: int = 0,
        device: torch.device | str = "cpu",
        text_multiple: int = 1,
        on_broken_sample: Literal["skip", "stop"] = "skip",
        cache_bytes: int = 0,
        say: Callable[[str], None] = print,
    ) -> None:
        self.order, self.consumed, self.broken = order, consumed, 0
        self.device = torch.device(device)
        self._micro_batches_a_step = world * accumulation
        self._say, self._named = say, set[str]()
        draw = partial(draw_sample, order.seed, sampling, caption_dropout)
        attempts = 0 if on_broken_sample == "stop" else ATTEMPTS
        self._ahead: ShardsAhead | None = None
        if cache_bytes and isinstance(dataset.reader, RemoteReader):
            self._ahead = ShardsAhead(dataset.reader, order, dataset.index.shard, consumed, cache_bytes, say)
        self._batches: Iterator[Batch | BrokenSample] = iter(
            DataLoader(
                BatchMaker(dataset, draw, text_multiple, attempts),
                sampler=TaskStream(order, consumed, rank, world, accumulation),
                batch_size=None,
                collate_fn=as_it_is,
                num_workers=num_workers,
                prefetch_factor=PREFETCH if num_workers else None,
                worker_init_fn=leave_signals_to_the_parent,
                pin_memory=self.device.type == "cuda",
            )
        )
        end_workers_at_exit(self._batches)
        checked = self._checked()
        self._stream: Iterator[Batch] = copied_ahead(checked, self.device) if self.device.type == "cuda" else checked

    def __iter__(self) -> Iterator[Batch]:
        """Goes on where the last iteration left off."""
        return self._stream

    def _checked(self) -> Iterator[Batch]:
        for batch in self._batches:
            if isinstance(batch, BrokenSample):
                raise batch
            if self._ahead is not None:
                self._ahead.at(batch.place)
            for message in batch.broken:
                self.broken += 1
                if message not in self._named:
                    self._named.add(message)
                    self._say(f"broken sample replaced by its neighbour: {message}")
            yield batch

    def stepped(self) -> None:
        """Count one optimizer step of all ranks."""
        self.consumed += self._micro_batches_a_step

    def state(self) -> dict[str, Any]:
        """The position and what it is a position in; a checkpoint's client state. The same on every rank."""
        return {"consumed": self.consumed, "order": self.order.state()}

    @property
    def epoch(self) -> float:
        """Epochs consumed."""
        return self.consumed / self.order.length

    def close(self) -> None:
        """Stop the workers and the copying of remote shards."""
        self._stream = iter(())
        if hasattr(
            self._batches, "_shutdown_workers"
        ):  # torch's iterator over worker processes; else they end when it dies
            self._batches._shutdown_workers()
        if self._ahead is not None:
            self._ahead.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def draw_sample(
    seed: int, sampling: SigmaSampling, caption_dropout: float, epoch: int, index: int, latent_shape: tuple[int, ...]
) -> Draws:
    """train.flow.sample_draws, arguments reordered so that a `partial` of it is picklable."""
    return sample_draws(seed, epoch, index, latent_shape, sampling, caption_dropout)


class TaskStream(Sampler[Task]):
    """Plans in the main process: one plan of the epoch in memory, however many workers there are."""

    def __init__(self, order: Order, consumed: int, rank: int, world: int, accumulation: int) -> None:
        self.order, self.start = order, (consumed, rank, world, accumulation)

    def __iter__(self) -> Iterator[Task]:
        for place in places(*self.start):
            epoch, indices = self.order.micro_batch(place)
            yield Task(place, epoch, indices.tolist())


class BatchMaker(Dataset[Any]):
    """What runs in the workers: a task in, a batch out."""

    def __init__(self, dataset: ShardDataset, draw: DrawSample, text_multiple: int, attempts: int) -> None:
        self.dataset, self.draw, self.options = dataset, draw, (text_multiple, attempts)

    def __getitem__(self, task: Task) -> Batch | BrokenSample:
        try:
            return make_batch(self.dataset, *task, self.draw, *self.options)
        except BrokenSample as error:  # returned, so that the one line reaches the user without a worker's traceback
            return error.with_traceback(None)


def leave_signals_to_the_parent(worker: int) -> None:
    """Slurm and Ctrl-C signal every process of a job; a reader that died of it would take the last checkpoint along."""
    for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT):
        signal.signal(number, signal.SIG_IGN)


def end_workers_at_exit(batches: Any) -> None:
    """Tell workers to end before multiprocessing sends them a SIGTERM, which they ignore, and waits for them forever."""
    alive = weakref.ref(batches)

    def end() -> None:
        iterator: Any = alive()
        if hasattr(iterator, "_shutdown_workers"):
            iterator._shutdown_workers()

    atexit.register(end)


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
