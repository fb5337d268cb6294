"""The run's data by its options: which data set, in which order, through which loader."""

from collections.abc import Callable

from qwen_image.pipeline import QwenImagePipeline
from train.config.train_config import TrainConfig
from train.data.indexed_loader import BatchLoader
from train.data.sample_order import Order
from train.data.shard_dataset import ShardDataset
from train.data.webdataset_stream import StreamedSet, StreamLoader
from train.data.worker_loader import Batches, Reading
from train.flow.timestep_sampling import SigmaSampling
from train.process.ranks import Ranks

WEAKER = (
    "warning: loader webdataset: the order depends on the number of ranks and workers, samples may come twice before "
    "others come once, and a resumed run sees other samples than an uninterrupted one would"
)


def open_data(config: TrainConfig, say: Callable[[str], None]) -> ShardDataset | StreamedSet:
    """The data set of `config.data`. Raises FileNotFoundError, ValueError or another OSError with one line."""
    try:
        if config.loader == "webdataset":
            say(WEAKER)
            return StreamedSet(config.data, say, config.data_cache_path)
        options = config.validation_samples, config.max_prompt_tokens, say, config.data_cache_path
        return ShardDataset(config.data, *options)
    except ImportError as error:  # fsspec has the protocol, but its package is missing
        raise ValueError(f"data: {config.data} needs another package: {error}") from None


def make_order(config: TrainConfig, dataset: ShardDataset | StreamedSet) -> Order | None:
    """The order of training; None for streams, which have none."""
    if isinstance(dataset, StreamedSet):
        return None
    return dataset.order(config.batch_size, config.seed, config.shuffle_window, config.tail, config.dataset_repeat)


def make_loader(
    config: TrainConfig,
    dataset: ShardDataset | StreamedSet,
    order: Order | None,
    sampling: SigmaSampling,
    ranks: Ranks,
    consumed: int,
    say: Callable[[str], None],
) -> Batches:
    """This rank's micro-batches, from the global stream's place `consumed` on. One rank of each node fills the cache."""
    reading = Reading(
        caption_dropout=config.caption_dropout,
        rank=ranks.rank,
        world=ranks.world,
        accumulation=config.gradient_accumulation_steps,
        consumed=consumed,
        num_workers=config.num_workers,
        device=ranks.device,
        text_multiple=config.text_multiple,
        on_broken_sample=config.on_broken_sample,
        say=say,
    )
    if isinstance(dataset, StreamedSet):
        return StreamLoader(
            dataset.urls,
            config.batch_size,
            sampling,
            reading,
            seed=config.seed,
            empty_prompt=dataset.empty_prompt,
            max_prompt_tokens=config.max_prompt_tokens,
            total=len(dataset),
        )
    assert order is not None
    cache_bytes = int(config.data_cache_gb * 1e9) if ranks.local_rank == 0 else 0
    return BatchLoader(dataset, order, sampling, reading, cache_bytes)


def sigma_sampling(config: TrainConfig, pipeline: QwenImagePipeline) -> SigmaSampling:
    return SigmaSampling(
        config.timestep_sampling, config.logit_mean, config.logit_std, config.timestep_shift, pipeline.schedule
    )
