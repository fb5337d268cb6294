"""The order of training: which samples stand in which micro-batch, as a pure function of (seed, epoch).

The global stream of micro-batches is endless and the same whatever the number of ranks: micro-batch i lies in epoch
i // M at place i % M, and M is the same for every epoch. So the state of the loader is one number, the count of
micro-batches consumed by all ranks together, and resuming means starting to count there.

    order = Order(bucket, shard, batch_size=4, seed=0)
    epoch, indices = order.micro_batch(i)           # indices [B]: virtual indices, see `Order.locate`
    for i in places(consumed, rank, world, accumulation): ...

Only numpy's raw Philox words are used: numpy promises those for good, but not what Generator.permutation returns.
"""

import math
import threading
import warnings
from collections import OrderedDict
from collections.abc import Iterator
from typing import Literal

import numpy as np

from train.data.sample_repeats import GRID, Repeats

Tail = Literal["auto", "wrap", "drop"]

# tail="auto": a bucket with at least this many micro-batches drops its tail (less than 1 % of the bucket, another 1 %
# in each epoch); a smaller one wraps. So a set of 20 images loses nothing, and no bucket is ever lost as a whole.
AUTO_DROP_MICRO_BATCHES = 100

# Shards that are read at the same time (about 1 GB each): samples are shuffled within a window of so many shards, and
# the shards themselves over the whole set. Reads then stay within what the page cache or a local cache holds.
WINDOW = 16


class Order:
    """The micro-batches of every epoch.

    Args:
        bucket: int [N], bucket id of each sample; a micro-batch holds samples of one bucket only.
        shard: int [N], shard of each sample.
        batch_size: B, samples a micro-batch.
        seed: 0 <= seed < 2**63.
        window: K, shards whose samples are mixed with each other.
        tail: what happens to the n_b % B samples of a bucket that fill no micro-batch. `wrap` fills it up with samples
            of the same bucket, so that every sample comes at least once an epoch; `drop` leaves them out of this epoch;
            `auto` decides per bucket (AUTO_DROP_MICRO_BATCHES).
        repeat: each sample comes so many times an epoch, each time with noise of its own.
        weight: float [N]; each sample comes so many times `repeat` an epoch, fractions on average
            (train/data/sample_repeats.py). None: once. The micro-batches of a bucket stay the same number in every epoch.
        members: the samples that take part (default: all); validation samples are left out here.

    Attributes:
        length: M, micro-batches an epoch (the same for every epoch).
        wrapped: samples an epoch that are read once more to fill micro-batches up; with fractional weights on average.
        dropped: samples an epoch that are left out (others each time, except those of `lost_buckets`).
        lost_buckets: ids of buckets that never fill a single micro-batch under `drop`; warned of as well.
        repeats: samples an epoch, by their weights and `repeat`.

    Raises:
        ValueError: an argument out of range, or no micro-batch at all.
    """

    def __init__(
        self,
        bucket: np.ndarray,
        shard: np.ndarray,
        batch_size: int,
        seed: int = 0,
        window: int = WINDOW,
        tail: Tail = "auto",
        repeat: int = 1,
        members: np.ndarray | None = None,
        weight: np.ndarray | None = None,
    ) -> None:
        assert bucket.shape == shard.shape and bucket.ndim == 1, "bucket and shard: one entry a sample"
        for name, value, least in (("batch_size", batch_size, 1), ("window", window, 1), ("repeat", repeat, 1)):
            if value < least:
                raise ValueError(f"{name} must be at least {least}, got {value}")
        if not 0 <= seed < 2**63:
            raise ValueError(f"seed must lie in 0 … 2**63 - 1, got {seed}")
        if tail not in ("auto", "wrap", "drop"):
            raise ValueError(f"tail must be one of auto, wrap, drop, got {tail!r}")
        self.batch_size, self.seed, self.window, self.tail, self.repeat = batch_size, seed, window, tail, repeat
        self.samples = len(bucket)
        self._members = np.arange(self.samples, dtype=np.int64) if members is None else members.astype(np.int64)
        self.bucket_ids, self._bucket = np.unique(bucket[self._members], return_inverse=True)
        self._shard = shard[self._members].astype(np.int64)
        self._shards = int(self._shard.max()) + 1 if len(self._shard) else 0
        self._counts = np.bincount(self._bucket, minlength=len(self.bucket_ids)) * repeat
        total = self._counts.astype(np.float64)
        self._repeats: Repeats | None = None
        if weight is not None and len(self._members) and (weight[self._members] != 1).any():
            self._repeats = Repeats(weight[self._members], self._bucket, len(self.bucket_ids), repeat, seed)
            self._counts, total = self._repeats.counts(tail), self._repeats.total / GRID
        self._most = repeat if self._repeats is None else self._repeats.most
        wraps = self._counts % batch_size != 0
        if tail != "wrap":
            wraps &= (self._counts < AUTO_DROP_MICRO_BATCHES * batch_size) & (tail == "auto")
        self._micro_batches = self._counts // batch_size + wraps
        self.length = int(self._micro_batches.sum())
        surplus = self._micro_batches * batch_size - total
        self.wrapped = round(surplus[surplus > 0].sum())
        self.dropped = round(-surplus[surplus < 0].sum())
        self.repeats = float(total.sum())
        lost = self._micro_batches == 0
        self.lost_buckets: list[int] = [int(b) for b in self.bucket_ids[lost]]
        if self.length == 0:
            raise ValueError(
                f"{len(self._members)} samples × dataset_repeat {repeat} in {len(self.bucket_ids)} buckets fill no "
                f"micro-batch of {batch_size} with tail={tail}: use tail=wrap, a smaller batch size or more samples"
            )
        if self.lost_buckets:
            warnings.warn(
                f"tail=drop never trains {int(self._counts[lost].sum())} samples: {len(self.lost_buckets)} buckets hold "
                f"fewer than batch_size={batch_size} (ids {self.lost_buckets[:8]}); tail=wrap keeps them",
                stacklevel=2,
            )
        self._plans: OrderedDict[int, np.ndarray] = OrderedDict()
        self._lock = threading.Lock()

    def micro_batches_by_bucket(self) -> dict[int, int]:
        """How many an epoch has, by bucket id."""
        return {int(bucket): int(count) for bucket, count in zip(self.bucket_ids, self._micro_batches, strict=True)}

    def plan(self, epoch: int) -> np.ndarray:
        """Virtual indices [M, B] of one epoch, int64. The last two plans are kept: the stream runs across epoch ends."""
        with self._lock:  # the thread that copies remote shards ahead asks too
            if epoch not in self._plans:
                self._plans[epoch] = self._make_plan(epoch)
                while len(self._plans) > 2:
                    self._plans.popitem(last=False)
            self._plans.move_to_end(epoch)
            return self._plans[epoch]

    def micro_batch(self, i: int) -> tuple[int, np.ndarray]:
        """Epoch and virtual indices [B] of the i-th micro-batch of the global stream."""
        epoch, place = divmod(i, self.length)
        return epoch, self.plan(epoch)[place]

    def micro_batches(self, start: int, count: int) -> np.ndarray:
        """Virtual indices [n, B] of `count` micro-batches from place `start` on, or of those to the end of the next epoch."""
        epoch, place = divmod(start, self.length)
        virtual = self.plan(epoch)[place : place + count]
        if len(virtual) < count:
            virtual = np.concatenate([virtual, self.plan(epoch + 1)[: count - len(virtual)]])
        return virtual

    def micro_batches_of(self, epochs: float) -> int:
        """How many so many epochs have."""
        return math.ceil(epochs * self.length)

    def locate(self, virtual: int) -> tuple[int, int]:
        """Sample and repeat number of a virtual index = sample + N · repeat number.

        The virtual index seeds noise, σ and caption dropout, and comes at most once an epoch: a sample that is repeated
        or wrapped around gets other noise each time.
        """
        repeat, sample = divmod(int(virtual), self.samples)
        return sample, repeat

    def state(self) -> dict[str, int | str]:
        """What, together with the data, determines the order; a checkpoint compares it when a run is resumed."""
        return {
            "seed": self.seed,
            "batch_size": self.batch_size,
            "window": self.window,
            "tail": self.tail,
            "repeat": self.repeat,
            "samples": self.samples,
            "members": len(self._members),
            "micro_batches": self.length,
            **({} if self._repeats is None else {"weights": self._repeats.digest}),
        }

    def summary(self) -> str:
        """One line for the console before step 0."""
        tail = [f"{self.wrapped} read again to fill up"] if self.wrapped else []
        tail += [f"{self.dropped} left out"] if self.dropped else []
        times = f" × {self.repeat}" if self.repeat > 1 else ""
        if self._repeats is not None:
            times += f", by their weights {self.repeats:,.6g} an epoch,"
        return (
            f"{len(self._members)} samples{times} in {len(self.bucket_ids)} buckets: "
            f"{self.length} micro-batches of {self.batch_size} an epoch" + (f" ({', '.join(tail)})" if tail else "")
        )

    def _make_plan(self, epoch: int) -> np.ndarray:
        words = np.random.Philox(key=np.array([self.seed, epoch], dtype=np.uint64)).random_raw
        shard_place = np.argsort(np.argsort(words(self._shards), kind="stable"), kind="stable")
        window = (shard_place // self.window)[self._shard]
        member = np.arange(len(self._shard))
        virtual, counts = self._members, self._counts
        if self._repeats is not None:
            times = self._repeats.of(epoch)
            member = np.repeat(member, times)
            number = np.arange(len(member)) - np.repeat(np.cumsum(times) - times, times)
            virtual = self._members[member] + number * self.samples
            counts = np.bincount(self._bucket[member], minlength=len(counts))
        elif self.repeat > 1:
            member = np.tile(member, self.repeat)
            virtual = (np.arange(self.repeat)[:, None] * self.samples + self._members[None]).ravel()
        # Sorted by (bucket, window, random): shuffle, then sort stably by the small key (2 × faster than np.lexsort).
        windows = int(window.max()) + 1
        key = self._bucket * windows + window
        key = key.astype(np.uint16 if len(self.bucket_ids) * windows <= 2**16 else np.int64)
        shuffled = np.argsort(words(len(member)), kind="stable")
        order = shuffled[np.argsort(key[member[shuffled]], kind="stable")]
        virtual, window = virtual[order], window[member[order]]

        plan = np.empty((self.length, self.batch_size), dtype=np.int64)
        last_window = np.empty(self.length, dtype=np.int64)
        first = row = 0
        for count, rows in zip(counts.tolist(), self._micro_batches.tolist(), strict=True):
            lap, place = np.divmod(np.arange(rows * self.batch_size), count)
            cells = virtual[first + place] + lap * (self.samples * self._most)
            plan[row : row + rows] = cells.reshape(rows, self.batch_size)
            last = np.minimum(np.arange(1, rows + 1) * self.batch_size, count) - 1
            last_window[row : row + rows] = window[first + last]
            first, row = first + count, row + rows
        return plan[np.lexsort((words(self.length), last_window))]


def places(consumed: int, rank: int, world: int, accumulation: int = 1) -> Iterator[int]:
    """Endless places in the global stream of one rank's micro-batches, from the optimizer step that starts at `consumed`.

    An optimizer step takes the n = world · accumulation micro-batches [consumed, consumed + n), however n is split.
    """
    assert 0 <= rank < world and accumulation >= 1 and consumed >= 0
    while True:
        for turn in range(accumulation):
            yield consumed + turn * world + rank
        consumed += world * accumulation


def steps_of(num_epochs: float, micro_batches: int, world: int, accumulation: int) -> int:
    """Optimizer steps that cover `num_epochs` epochs of `micro_batches` each."""
    return math.ceil(num_epochs * micro_batches / (world * accumulation))
