"""The batches of one rank: an endless iterator with worker processes, prefetched to the device.

    with BatchLoader(dataset, order, sampling, Reading(rank=rank, world=world, consumed=state["consumed"])) as loader:
        for batch in loader:        # endless; gradient_accumulation_steps of them make an optimizer step
            …
            loader.stepped()        # after each optimizer step
        state = loader.state()      # {"consumed": …}: goes into the checkpoint

What a batch holds depends on its place in the global stream alone: not on the number of workers, ranks or accumulation
steps. The state counts optimizer steps that were taken, never what workers have read ahead.
"""

from collections.abc import Iterator
from functools import partial
from typing import Any, NamedTuple

from torch.utils.data import Dataset, Sampler

from data_prep.encoding.caption_variants import caption_chance
from train.data.batch import Batch, CaptionChance, DrawSample, make_batch
from train.data.draws import Draws, sample_draws
from train.data.mixture import Mixture
from train.data.prior_order import PriorOrder
from train.data.remote_cache import ShardsAhead
from train.data.remote_shards import Unreachable
from train.data.sample import BrokenSample
from train.data.sample_order import Order, places
from train.data.shard_dataset import ShardDataset
from train.flow.timestep_sampling import SigmaSampling
from train.loader.worker_loader import DEFAULTS, Batches, Reading


class Task(NamedTuple):
    """A micro-batch to make: all that a worker has to be told."""

    place: int
    epoch: int
    indices: list[int]


class BatchLoader(Batches):
    """Micro-batches of one rank from the global stream; a broken sample is replaced by its neighbour.

    Args:
        sampling: how a sample's σ is drawn; the seed is the order's.
        cache_bytes: for remote shards: keep so many bytes of those that come next in the local cache, of each set of a
            mixture its share. Give it to one rank of each node; 0 reads every sample remotely (or from what others cached).
    """

    def __init__(
        self,
        dataset: ShardDataset | Mixture,
        order: Order | PriorOrder,
        sampling: SigmaSampling,
        reading: Reading = DEFAULTS,
        cache_bytes: int = 0,
    ) -> None:
        self.order = order
        draw = partial(draw_sample, order.seed, sampling, reading.caption_dropout)
        chance = partial(caption_chance, order.seed)
        maker = BatchMaker(dataset, draw, reading.text_padding, reading.attempts, chance)
        tasks = TaskStream(order, reading)
        super().__init__(maker, tasks, reading, order.state(), order.length, "replaced by its neighbour")
        self._ahead: list[ShardsAhead] = []
        remote = dataset.remote_shards() if cache_bytes else []
        whole = sum(shard.bytes for reader, _ in remote for shard in reader.manifest.shards)
        for reader, shard_of in remote:  # their threads begin after the workers were forked
            share = sum(shard.bytes for shard in reader.manifest.shards) / whole
            limit, consumed, say = int(cache_bytes * share), reading.consumed, reading.say
            self._ahead.append(ShardsAhead(reader, order, shard_of, consumed, limit, say))

    def arrived(self, batch: Batch) -> None:
        for ahead in self._ahead:
            ahead.at(batch.place)

    def close(self) -> None:
        """Stop the workers and the copying of remote shards."""
        super().close()
        for ahead in self._ahead:
            ahead.close()


def draw_sample(
    seed: int, sampling: SigmaSampling, caption_dropout: float, epoch: int, index: int, latent_shape: tuple[int, ...]
) -> Draws:
    """train.data.draws.sample_draws, arguments reordered so that a `partial` of it is picklable."""
    return sample_draws(seed, epoch, index, latent_shape, sampling, caption_dropout)


class TaskStream(Sampler[Task]):
    """Plans in the main process: one plan of the epoch in memory, however many workers there are."""

    def __init__(self, order: Order | PriorOrder, reading: Reading) -> None:
        self.order, self.start = order, (reading.consumed, reading.rank, reading.world, reading.accumulation)

    def __iter__(self) -> Iterator[Task]:
        for place in places(*self.start):
            epoch, indices = self.order.micro_batch(place)
            yield Task(place, epoch, indices.tolist())


class BatchMaker(Dataset[Any]):
    """What runs in the workers: a task in, a batch out."""

    def __init__(
        self,
        dataset: ShardDataset | Mixture,
        draw: DrawSample,
        text_padding: int,
        attempts: int,
        caption_chance: CaptionChance,
    ) -> None:
        self.dataset, self.draw, self.options = dataset, draw, (text_padding, attempts, caption_chance)

    def __getitem__(self, task: Task) -> Batch | BrokenSample | Unreachable:
        try:
            return make_batch(self.dataset, *task, self.draw, *self.options)
        except (
            BrokenSample,
            Unreachable,
        ) as error:
            return error.with_traceback(None)
