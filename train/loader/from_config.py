"""The run's data by its options: which data set, in which order, in batches of which shapes, through which loader."""

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from fractions import Fraction
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np

from data_prep.encoding.caption_variants import CaptionOptions, encoded_captions, refuse_in_training
from data_prep.shard_format.shards import MANIFEST
from files.shown import shown
from qwen_image.encoders.text_encoder import MAX_TOKENS
from qwen_image.loading.model_files import ModelSource, is_here, presumed_member, resolve_model
from qwen_image.model.family import TEXT_TO_IMAGE, Member
from train.config.data_sources import DataSource
from train.config.train_config import TrainConfig
from train.data.mixture import Member as SetMember
from train.data.mixture import Mixture, without_subject
from train.data.prior_order import PriorOrder
from train.data.sample import DataSet
from train.data.sample_order import Order
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

    dataset: ShardDataset | Mixture | StreamedSet
    order: Order | PriorOrder | None
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
        if line := check_masks(dataset, config.masked_loss, config.mask_min_weight):
            ranks.say(line)
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
            steps = -(-order.micro_batches_of(config.num_epochs or 1) // (ranks.world * accumulation))
        reading = Reading(
            caption_dropout=config.caption_dropout,
            rank=ranks.rank,
            world=ranks.world,
            accumulation=accumulation,
            num_workers=config.num_workers,
            device=ranks.device,
            text_padding=text_padding,
            masks=config.masked_loss,
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
            "shards": {} if isinstance(self.dataset, StreamedSet) else self.dataset.shard_states(),
            "global_batch": self.global_batch,
            "steps": self.steps,
        }

    def check_unchanged(self, remembered: dict[str, Any], ignore: bool, ranks: Ranks) -> None:
        """Whether the shards here are still those of the checkpoint whose identity is `remembered`; a collective.

        Raises ValueError naming those that were edited, unless they are to be ignored.
        """
        dataset = self.dataset
        if not isinstance(dataset, StreamedSet) and not ignore:
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
                variants=encoded_captions(self.dataset.manifest.encoding)[1] > 1,
            )
        assert self.order is not None
        return BatchLoader(self.dataset, self.order, sampling, reading, self.cache_bytes)


def open_data(config: TrainConfig, say: Callable[[str], None]) -> ShardDataset | Mixture | StreamedSet:
    """The data of `config.data` and `config.prior_data`. Raises ValueError or OSError with one line."""
    sources, prior, tokens = config.data_sources, config.prior_sources, config.max_prompt_tokens
    captions = CaptionOptions.from_options(config)
    with ExitStack() as leaving:
        scratch = Path(leaving.enter_context(TemporaryDirectory(prefix="dry_run-"))) if config.dry_run else None
        if config.loader == "webdataset":
            say(WEAKER)
            with named_packages(sources[0]):
                place, cache = without_traces(sources[0].address, scratch, config.data_cache_path)
                stream = StreamedSet(place, say, cache, captions)
            stream.name = sources[0].address
            if stream.encoded:
                refuse_in_training(stream.name, captions, stream.manifest.encoding)
            return stream
        whole = len(sources) == 1 and sources[0].weight == 1 and not prior

        def opened(number: int, source: DataSource) -> ShardDataset:
            own = None if scratch is None else scratch / str(number)
            place, cache = without_traces(source.address, own, config.data_cache_path)
            held_out, told = config.validation_samples if whole else 0, captions
            if number >= len(sources):
                told = without_subject(captions)
            with named_packages(source):
                found = ShardDataset(place, held_out, tokens, say, cache, told, config.masked_loss)
            found.name = source.address
            if found.encoded:
                refuse_in_training(found.name, told, found.manifest.encoding)
            return found

        sets = [opened(number, source) for number, source in enumerate([*sources, *prior])]
        dataset: ShardDataset | Mixture = sets[0]
        if not whole:
            kinds = [False] * len(sources) + [True] * len(prior)
            found = zip(sets, [*sources, *prior], kinds, strict=True)
            members = [SetMember(each, source.weight, is_prior) for each, source, is_prior in found]
            dataset = Mixture(members, config.validation_samples, config.prior_weight)
        if line := cut_captions(dataset, tokens):
            say(line)
    return dataset


@contextmanager
def named_packages(source: DataSource) -> Iterator[None]:
    """fsspec has the protocol, but its package is missing: a ValueError."""
    try:
        yield
    except ImportError as error:
        raise ValueError(f"data: {source.address} needs another package: {error}") from None


def without_traces(data: str, scratch: Path | None, cache: Path) -> tuple[str, Path]:
    """Where a set is read, and its cache: `data` and `cache`, but in a dry run in `scratch`, which goes.

    What is copied from remote, and an index that local shards lack, then lie there.
    """
    folder = Path(data)
    if scratch is None:
        return data, cache
    scratch.mkdir(exist_ok=True)
    if not folder.is_dir() or (folder / MANIFEST).is_file():
        return data, scratch
    (scratch / "shards").mkdir()
    for file in folder.iterdir():
        (scratch / "shards" / file.name).symlink_to(file.absolute())
    return str(scratch / "shards"), scratch


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


def check_masks(dataset: DataSet, masked_loss: bool, minimum: float) -> str | None:
    """What to say of the masks of the data, if there are any. Raises ValueError where the loss shall be masked by none."""
    if not masked_loss:
        unused = f"{dataset.masked} samples have masks, which are not used without --masked_loss"
        return unused if dataset.masked else None
    if not dataset.masked:
        again = ", and encode that with encode_shards.py" if dataset.encoded else ""
        raise ValueError(
            f"masked_loss: {shown(dataset.name)} has no masks. python data_prep/make_shards.py --dataset_base_path PHOTOS "
            "--output_path SHARDS packs x-masklabel.png and x.mask.png beside x.jpg as its mask, --mask_folder MASKS takes "
            f"files of equal stems, --mask_from_alpha the alpha channel{again}"
        )
    line = f"masked loss: {dataset.masked} samples have masks, outside of which the loss weighs {minimum:g}"
    if dataset.index is not None:
        whole, black = len(dataset.index) - dataset.masked, int((dataset.index.mask_share == 0).sum())
        line += f"; {whole} have none and count as a whole" * (whole > 0)
        line += f"; warning: {black} masks are all black, and count as if they were not there" * (black > 0)
    return line


def cut_captions(dataset: ShardDataset | Mixture, max_prompt_tokens: int) -> str | None:
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


def caption_lines(dataset: ShardDataset | Mixture | StreamedSet) -> list[str]:
    """What to say of captions that aren't trained as they stand."""
    if isinstance(dataset, Mixture):
        return list(dict.fromkeys(line for member in dataset.members for line in caption_lines(member.dataset)))
    if dataset.encoded:
        options, count = encoded_captions(dataset.manifest.encoding)
        how = "of which one is drawn for each sample of each epoch; validation takes the first"
        variants = f", in {count} variants, {how}" if count > 1 else ""
        line = f"captions were encoded {options.flags() or 'as they stood'}{variants}"
        return [line] if count > 1 or options.used() else []
    several = dataset.manifest.totals.get("several_captions", 0)
    said = [f"one of several for {several} samples"] if several else []
    said += [flags] if (flags := dataset.captions.flags()) else []
    how = ", drawn anew for each sample of each epoch; validation takes what chance has no part in"
    return [f"captions: {', '.join(said)}{how if several or dataset.captions.varies else ''}"] if said else []


def make_order(config: TrainConfig, dataset: ShardDataset | Mixture | StreamedSet) -> Order | PriorOrder | None:
    """The order of training; None for streams, which have none."""
    if isinstance(dataset, StreamedSet):
        return None
    how = config.batch_size, config.seed, config.shuffle_window, config.tail
    order = dataset.order(*how, config.dataset_repeat)
    if isinstance(dataset, Mixture) and len(dataset.prior):
        try:
            prior = dataset.prior_order(*how)
        except ValueError as error:
            raise ValueError(f"prior_data: {error}") from None
        return PriorOrder(order, prior, Fraction(str(config.prior_share)))
    return order
