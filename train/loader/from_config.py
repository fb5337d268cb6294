"""The run's data by its options: which data set, in which order, in batches of which shapes, through which loader."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np

from data_prep.encoding.caption_variants import CaptionOptions, encoded_options, refuse_in_training
from data_prep.shard_format.shards import MANIFEST
from files.shown import shown
from qwen_image.encoders.text_encoder import MAX_TOKENS
from qwen_image.loading.model_files import ModelSource, is_here, presumed_member, resolve_model
from qwen_image.model.family import TEXT_TO_IMAGE, Member
from train.config.train_config import TrainConfig
from train.data.sample import DataSet
from train.data.sample_order import Order, steps_of
from train.data.shard_dataset import ShardDataset
from train.flow.timestep_sampling import SigmaSampling
from train.loader.batch_shapes import (
    CHARACTERS_A_TOKEN,
    BatchOptions,
    BatchShape,
    batch_shapes,
    choose_text_padding,
    largest_batch,
)
from train.loader.indexed_loader import BatchLoader
from train.loader.webdataset_stream import StreamedSet, StreamLoader
from train.loader.worker_loader import Batches, Reading
from train.process.ranks import Ranks

WEAKER = (
    "warning: loader webdataset: the order depends on the number of ranks and workers, samples may come twice before "
    "others come once, and a resumed run sees other samples than an uninterrupted one would"
)


@dataclass(frozen=True)
class RunData:
    """Everything about a run's data that is known before its model is.

    Attributes:
        order: which samples stand in which micro-batch; None for a stream, which has no order.
        options: what decides the shape of a micro-batch.
        text_padding: prompts are padded to a multiple of so many tokens.
        shapes: how many shapes of a batch there are at the most.
        largest: the micro-batch with the most tokens that can occur.
        steps: optimizer steps of the whole run.
        reading: how this rank reads; where it starts is yet open.
        cache_bytes: of remote shards that this rank copies ahead.
    """

    dataset: ShardDataset | StreamedSet
    order: Order | None
    options: BatchOptions
    text_padding: int
    shapes: int
    largest: BatchShape
    steps: int
    reading: Reading
    seed: int
    cache_bytes: int

    @classmethod
    def from_config(cls, config: TrainConfig, ranks: Ranks) -> "RunData":
        """Open the data set and count. Raises FileNotFoundError, ValueError or another OSError with one line."""
        dataset = open_data(config, ranks.say)
        order = make_order(config, dataset)
        member = TEXT_TO_IMAGE
        if dataset.paired:
            check_empty_captions(dataset, config.caption_dropout)
            member = member_of(ModelSource.from_options(config), config.dry_run)
        added = dataset.captions.added_characters
        options = BatchOptions(config.batch_size, config.max_prompt_tokens, config.caption_dropout, added, member)
        text_padding = config.text_padding or choose_text_padding(options, dataset, ranks.device)
        accumulation, steps = config.gradient_accumulation_steps, config.max_steps
        if steps is None:
            assert order is not None, "only a run with an order knows epochs"
            steps = steps_of(config.num_epochs or 1, order.length, ranks.world, accumulation)
        reading = Reading(
            caption_dropout=config.caption_dropout,
            rank=ranks.rank,
            world=ranks.world,
            accumulation=accumulation,
            num_workers=config.num_workers,
            device=ranks.device,
            text_padding=text_padding,
            on_broken_sample=config.on_broken_sample,
        )
        return cls(
            dataset,
            order,
            options,
            text_padding,
            batch_shapes(options, dataset, text_padding).shapes,
            largest_batch(options, dataset, text_padding),
            steps,
            reading,
            config.seed,
            cache_bytes=int(config.data_cache_gb * 1e9) if ranks.local_rank == 0 else 0,
        )

    @property
    def global_batch(self) -> int:
        """Samples of one optimizer step over all ranks."""
        return self.options.batch_size * self.reading.accumulation * self.reading.world

    @property
    def decided(self) -> dict[str, Any]:
        """Options that were left open and are decided here, for whoever writes the configuration down."""
        return {"text_padding": self.text_padding}

    def identity(self) -> dict[str, Any]:
        """What a checkpoint remembers of the data: a run on other data, or in another order, is another run."""
        return {
            "data": self.dataset.fingerprint,
            "order": {"loader": "webdataset"} if self.order is None else self.order.state(),
            "shards": self.dataset.shard_states() if isinstance(self.dataset, ShardDataset) else {},
            "global_batch": self.global_batch,
            "steps": self.steps,
        }

    def check_unchanged(self, remembered: dict[str, Any], ignore: bool, ranks: Ranks) -> None:
        """Whether the shards here are still those of the checkpoint whose identity is `remembered`; a collective.

        Raises ValueError naming those that were edited, unless they are to be ignored.
        """
        dataset = self.dataset
        if isinstance(dataset, ShardDataset) and not ignore:
            ranks.on_main(lambda: dataset.check_unchanged(remembered.get("shards", {}), ranks.say))

    def lines(self) -> list[str]:
        """For people, before step 0: the order, and how much of it the run takes."""
        size, accumulation, world = self.options.batch_size, self.reading.accumulation, self.reading.world
        epochs = ""
        if self.order is not None:
            epochs = f", {self.steps * self.global_batch / size / self.order.length:.2f} epochs"
        return [
            *([] if self.order is None else [self.order.summary()]),
            *caption_lines(self.dataset),
            f"{self.steps} steps of {self.global_batch} samples ({world} ranks × {accumulation} accumulated × {size}){epochs}",
        ]

    def loader(self, sampling: SigmaSampling, consumed: int, say: Callable[[str], None]) -> Batches:
        """This rank's micro-batches, from the global stream's place `consumed` on. One rank of each node fills the cache."""
        reading = replace(self.reading, consumed=consumed, say=say)
        if isinstance(self.dataset, StreamedSet):
            return StreamLoader(
                self.dataset.urls,
                self.options.batch_size,
                sampling,
                reading,
                seed=self.seed,
                empty_prompt=self.dataset.empty_prompt,
                max_prompt_tokens=self.options.max_prompt_tokens,
                total=len(self.dataset),
                captions=self.dataset.captions,
                variants="variants" in (self.dataset.manifest.encoding or {}).get("captions", {}),
            )
        assert self.order is not None
        return BatchLoader(self.dataset, self.order, sampling, reading, self.cache_bytes)


def open_data(config: TrainConfig, say: Callable[[str], None]) -> ShardDataset | StreamedSet:
    """The data set of `config.data`. Raises FileNotFoundError, ValueError or another OSError with one line."""
    if config.loader == "webdataset":
        say(WEAKER)
    held_out, tokens = config.validation_samples, config.max_prompt_tokens
    captions = CaptionOptions.from_options(config)

    def opened(data: str, cache: Path) -> ShardDataset | StreamedSet:
        if config.loader == "webdataset":
            return StreamedSet(data, say, cache, captions)
        return ShardDataset(data, held_out, tokens, say, cache, captions)

    try:
        dataset = without_traces(config.data, opened) if config.dry_run else opened(config.data, config.data_cache_path)
    except ImportError as error:  # fsspec has the protocol, but its package is missing
        raise ValueError(f"data: {config.data} needs another package: {error}") from None
    if dataset.encoded:
        refuse_in_training(dataset.name, captions, dataset.manifest.encoding or {})
    if isinstance(dataset, ShardDataset) and (line := cut_captions(dataset, tokens)):
        say(line)
    return dataset


def without_traces(data: str, opened: Callable[[str, Path], ShardDataset | StreamedSet]) -> ShardDataset | StreamedSet:
    """For a dry run: what is copied from remote, and an index that local shards lack, lie in a folder that goes."""
    folder = Path(data)
    with TemporaryDirectory(prefix="dry_run-") as scratch:
        place = data
        if folder.is_dir() and not (folder / MANIFEST).is_file():
            place = f"{scratch}/shards"
            Path(place).mkdir()
            for file in folder.iterdir():
                (Path(place) / file.name).symlink_to(file.absolute())
        dataset = opened(place, Path(scratch))
    dataset.name = data
    return dataset


def member_of(source: ModelSource, dry_run: bool) -> Member:
    """Which member of the family the model is; a dry run downloads nothing to know it."""
    parts = ("transformer",)
    return resolve_model(source, parts).member if not dry_run or is_here(source, parts) else presumed_member(source)


def check_empty_captions(dataset: DataSet, caption_dropout: float) -> None:
    """Raise ValueError where captions of encoded pairs shall be dropped and what is trained instead was not encoded."""
    encoding = dataset.manifest.encoding or {}
    if caption_dropout > 0 and dataset.encoded and not encoding.get("empty_captions"):
        raise ValueError(
            f"caption_dropout {caption_dropout:g}: {dataset.name} lacks the embeddings of the empty caption with each sample's "
            "source images: encode it again with encode_shards.py --empty_captions, or train without"
        )


def cut_captions(dataset: ShardDataset, max_prompt_tokens: int) -> str | None:
    """What to say of captions that training cuts; None when there are none.

    Encoded sets know their tokens. Image sets know characters, of which English has about four a token: an estimate.
    """
    index = dataset.index
    tokens = index.prompt_tokens - index.picture_tokens
    if not dataset.encoded:
        longest = np.maximum(index.caption_length, index.longest_caption)
        tokens = (longest + dataset.captions.added_characters) // CHARACTERS_A_TOKEN
    long = np.flatnonzero(tokens > max_prompt_tokens)
    if not len(long):
        return None
    first, most = long[0], int(tokens[long].max())
    about = "" if dataset.encoded else "probably about "
    if max_prompt_tokens < min(most, MAX_TOKENS):
        could = (
            f"--max_prompt_tokens {min(most, MAX_TOKENS)} would hold {'them' if most <= MAX_TOKENS else 'more of them'}"
        )
    else:
        could = f"the text encoder reads no more than {MAX_TOKENS}: shorten them"
    return (
        f"warning: {len(long)} captions are longer than max_prompt_tokens={max_prompt_tokens} and are cut"
        f" ({about}{most} tokens at most); first {shown(dataset.source(int(first)))}; {could}"
    )


def caption_lines(dataset: ShardDataset | StreamedSet) -> list[str]:
    """What to say of captions that aren't trained as they stand."""
    encoded = (dataset.manifest.encoding or {}).get("captions", {})
    if dataset.encoded:
        flags = encoded_options(encoded).flags() or "as they stood"
        how = "of which one is drawn for each sample of each epoch; validation takes the first"
        variants = f", in {encoded['variants']} variants, {how}" if "variants" in encoded else ""
        return [f"captions were encoded {flags}{variants}"] if encoded else []
    several = dataset.manifest.totals.get("several_captions", 0)
    said = [f"one of several for {several} samples"] if several else []
    said += [flags] if (flags := dataset.captions.flags()) else []
    how = ", drawn anew for each sample of each epoch; validation takes what chance has no part in"
    return [f"captions: {', '.join(said)}{how if several or dataset.captions.varies else ''}"] if said else []


def make_order(config: TrainConfig, dataset: ShardDataset | StreamedSet) -> Order | None:
    """The order of training; None for streams, which have none."""
    if isinstance(dataset, StreamedSet):
        return None
    return dataset.order(config.batch_size, config.seed, config.shuffle_window, config.tail, config.dataset_repeat)
