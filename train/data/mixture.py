"""Several sets of shards as one data set: `--data A --data B:0.5`, and the prior set of `--prior_data`.

    dataset = Mixture([Member(ShardDataset("A")), Member(ShardDataset("B"), 0.5)], validation_samples=16)

The samples of the first set come first, then those of the second, and so on. Buckets of one size are one bucket, so that a
batch may hold samples of several sets. A sample's weight is its own times its set's.
"""

import bisect
import dataclasses
import hashlib
import json
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from random import Random
from typing import NamedTuple

import numpy as np

from data_prep.encoding.caption_variants import CaptionOptions
from data_prep.encoding.encoder_facts import EDIT_IDENTITY, IDENTITY
from data_prep.shard_format.shards import Bucket, Manifest, ShardIndex
from files.shown import shown
from train.data.remote_shards import RemoteReader
from train.data.sample import Sample
from train.data.sample_order import WINDOW, Order, Tail
from train.data.shard_dataset import Part, ShardDataset, first_by_name, names_in


class Member(NamedTuple):
    """A set of a mixture. `prior`: it preserves what the model knows (a regularization set), and is no subject."""

    dataset: ShardDataset
    weight: float = 1.0
    prior: bool = False

    @property
    def name(self) -> str:
        return self.dataset.name + (f":{self.weight:g}" if self.weight != 1 else "")


class Mixture:
    """Answers what a ShardDataset answers, of several of them (opened without validation samples). Picklable.

    Args:
        members: at least one of them is no prior.
        validation_samples: so many samples are held out over all sets but the prior, and with them all samples of the same
            source path, whichever set they lie in.
        prior_weight: factor on the loss of the prior's samples.

    Attributes:
        training: all samples that are trained, the prior's too; `prior` those alone. Sorted.
        others: as ShardDataset's.

    Raises:
        ValueError: two sets that cannot be trained together, or nothing left to train on.
    """

    def __init__(self, members: Sequence[Member], validation_samples: int = 0, prior_weight: float = 1.0) -> None:
        self.members, self.prior_weight = list(members), prior_weight
        first = self.members[0].dataset
        for other in self.members[1:]:
            check_together(first, other.dataset)
        self.name = " + ".join(member.name for member in self.members if not member.prior)
        self.encoded, self.prompt_width = first.encoded, first.prompt_width
        self.paired, self.empty_prompt = first.paired, first.empty_prompt
        self.masked = sum(member.dataset.masked for member in self.members)
        self.max_prompt_tokens, self.captions = first.max_prompt_tokens, first.captions
        self._starts = np.cumsum([0, *(len(member.dataset) for member in self.members)]).tolist()
        self.manifest, self.index = joined(self.members)
        self._sizes = {bucket.id: (bucket.width, bucket.height) for bucket in self.manifest.buckets}
        kinds = [np.full(len(member.dataset), member.prior) for member in self.members]
        self._is_prior = np.concatenate(kinds)
        self.prior = np.flatnonzero(self._is_prior)
        self.validation = self._first(validation_samples)
        self.training = np.delete(np.arange(len(self), dtype=np.int64), self.validation)
        if len(self.prior) == len(self.training):
            raise ValueError(
                f"{self.name} holds {len(self) - len(self.prior)} samples, validation_samples={validation_samples} of them, "
                "and those of the same names, held out: nothing is left to train on"
            )

    def __len__(self) -> int:
        return int(self._starts[-1])

    @property
    def fingerprint(self) -> str:
        """Names sets and weights; a checkpoint of others is refused."""
        facts = [[each.dataset.fingerprint, each.weight, *(["prior"] if each.prior else [])] for each in self.members]
        return hashlib.sha256(json.dumps(facts).encode()).hexdigest()

    @property
    def parts(self) -> list[Part]:
        """What is trained of each set."""
        found = []
        for member, start, end in zip(self.members, self._starts, self._starts[1:], strict=False):
            inside = self.training[(self.training >= start) & (self.training < end)]
            found.append(Part(member.dataset.name, inside, member.prior))
        return found

    def shard_states(self) -> dict[str, str]:
        """As ShardDataset's, each shard's name behind the number of its set."""
        states = ((number, member.dataset.shard_states()) for number, member in enumerate(self.members))
        return {f"{number}/{name}": state for number, found in states for name, state in found.items()}

    def check_unchanged(self, remembered: dict[str, str], say: Callable[[str], None]) -> None:
        """As ShardDataset's."""
        for number, member in enumerate(self.members):
            own = {name.partition("/")[2]: state for name, state in remembered.items() if name.startswith(f"{number}/")}
            member.dataset.check_unchanged(own, say)

    def size(self, index: int) -> tuple[int, int]:
        """Width and height in pixels, without reading the sample."""
        return self._sizes[int(self.index.bucket[index])]

    def order(
        self, batch_size: int, seed: int = 0, window: int = WINDOW, tail: Tail = "auto", repeat: int = 1
    ) -> Order:
        """The order of training over everything that is neither held out nor the prior's."""
        return self._order(~self._is_prior[self.training], batch_size, seed, window, tail, repeat)

    def prior_order(self, batch_size: int, seed: int = 0, window: int = WINDOW, tail: Tail = "auto") -> Order:
        """The order of the prior's samples among themselves."""
        return self._order(self._is_prior[self.training], batch_size, seed, window, tail, 1)

    def _order(self, chosen: np.ndarray, batch_size: int, seed: int, window: int, tail: Tail, repeat: int) -> Order:
        i = self.index
        return Order(i.bucket, i.shard, batch_size, seed, window, tail, repeat, self.training[chosen], i.weight)

    def training_subset(self, count: int) -> np.ndarray:
        """Sorted indices of `count` training samples that are no prior's, as ShardDataset's."""
        return np.setdiff1d(self._first(len(self.validation) + count), self.validation)

    def read(self, index: int, chance: Callable[[], Random] | None = None) -> Sample:
        """One sample, as ShardDataset.read gives and raises it; by the captions' options of its own set."""
        member, own = self._place(index)
        sample = replace(member.dataset.read(own, chance), index=int(index))
        return replace(sample, prior=True, loss_weight=self.prior_weight) if member.prior else sample

    def source(self, index: int) -> str:
        """Where the sample came from (the path in its json), for messages."""
        member, own = self._place(index)
        return member.dataset.source(own)

    def same_bucket(self, index: int) -> Iterator[int]:
        """The other training samples of this sample's bucket and kind (subject or prior), as ShardDataset's."""
        return self._neighbors(index, self.index.bucket[self.training] == self.index.bucket[index])

    def other_buckets(self, index: int) -> Iterator[int]:
        """The training samples of all other buckets and of this one's kind, as ShardDataset's."""
        return self._neighbors(index, self.index.bucket[self.training] != self.index.bucket[index])

    def _neighbors(self, index: int, chosen: np.ndarray) -> Iterator[int]:
        members = self.training[chosen & (self._is_prior[self.training] == self._is_prior[index])]
        start = int(np.searchsorted(members, index, side="right"))
        return (int(other) for other in np.roll(members, -start) if other != index)

    def remote_shards(self) -> list[tuple[RemoteReader, np.ndarray]]:
        """As ShardDataset's: of each remote set its reader, and the shard of each sample of the mixture, -1 for others'."""
        found = []
        for member, start in zip(self.members, self._starts, strict=False):
            for reader, shard in member.dataset.remote_shards():
                everywhere = np.full(len(self), -1, np.int64)
                everywhere[start : start + len(shard)] = shard
                found.append((reader, everywhere))
        return found

    def _place(self, index: int) -> tuple[Member, int]:
        """The set of a sample and its index there."""
        number = bisect.bisect_right(self._starts, int(index)) - 1
        return self.members[number], int(index) - self._starts[number]

    def _first(self, count: int) -> np.ndarray:
        if count == 0:
            return np.array([], dtype=np.int64)
        names = [name for each in self.members for name in ([] if each.prior else names_in(each.dataset.folder))]
        indices = np.flatnonzero(~self._is_prior)
        return indices[first_by_name(names, count, together=True)]


def joined(members: Sequence[Member]) -> tuple[Manifest, ShardIndex]:
    """Manifest and index of all sets: buckets of one size are one, shards are counted on."""
    manifests = [member.dataset.manifest for member in members]
    counts: Counter[tuple[tuple[int, int], ...]] = Counter()
    for manifest in manifests:
        for bucket in manifest.buckets:
            counts[(bucket.width, bucket.height), *bucket.sources] += bucket.count
    ids = {sizes: number for number, sizes in enumerate(sorted(counts))}
    buckets = [Bucket(ids[size, *others], *size, counts[size, *others], tuple(others)) for size, *others in ids]
    columns: dict[str, list[np.ndarray]] = {field.name: [] for field in dataclasses.fields(ShardIndex)}
    shards, variants = 0, max(member.dataset.index.variant_tokens.shape[1] for member in members)
    for member, manifest in zip(members, manifests, strict=True):
        own = vars(member.dataset.index).copy()
        places = np.zeros(max((bucket.id for bucket in manifest.buckets), default=0) + 1, np.int32)
        for bucket in manifest.buckets:
            places[bucket.id] = ids[(bucket.width, bucket.height), *bucket.sources]
        own |= {
            "bucket": places[own["bucket"]],
            "shard": own["shard"] + shards,
            "weight": own["weight"] * member.weight,
        }
        own["variant_tokens"] = padded_variants(member.dataset.index, variants)
        for name, column in own.items():
            columns[name].append(column)
        shards += len(manifest.shards)
    encoding = dict(manifests[0].encoding or {})
    if "empty_captions" in encoding:
        encoding["empty_captions"] = all((manifest.encoding or {}).get("empty_captions") for manifest in manifests)
    whole = Manifest(
        payload=manifests[0].payload,
        fingerprint="",  # the mixture's own
        options={},
        buckets=buckets,
        totals={"samples": sum(len(member.dataset) for member in members)},
        shards=[shard for manifest in manifests for shard in manifest.shards],
        versions={},
        encoding=encoding or None,
    )
    return whole, ShardIndex(**{name: np.concatenate(parts) for name, parts in columns.items()})


def padded_variants(index: ShardIndex, draws: int) -> np.ndarray:
    """int32 [N, draws]: the tokens of each sample's caption variants; of a set without them those of its one caption."""
    own = index.variant_tokens
    if own.shape[1] == 0 and draws:
        own = index.prompt_tokens[:, None].astype(np.int32)
    return np.pad(own, ((0, 0), (0, draws - own.shape[1])))


def without_subject(captions: CaptionOptions) -> CaptionOptions:
    """What of the captions' options is for the prior's: nothing that names the subject."""
    return replace(captions, trigger_word="", caption_prefix="", caption_suffix="")


def check_together(first: ShardDataset, other: ShardDataset) -> None:
    """Raise ValueError, naming both, where two sets can't stand in one batch."""

    def refuse(what: str, here: object, there: object, advice: str) -> ValueError:
        names = f"{shown(first.name)} and {shown(other.name)}"
        return ValueError(f"data: {names} cannot be trained together: {what} {here} and {there}; {advice}")

    again = "encode both with the same encode_shards.py --model"
    if first.encoded != other.encoded:
        here, there = ("encoded samples" if each.encoded else "images" for each in (first, other))
        raise refuse("they hold", here, there, "encode the images with data_prep/encode_shards.py")
    if first.paired != other.paired:
        here, there = ("pairs" if each.paired else "single images" for each in (first, other))
        raise refuse("they hold", here, there, "edit models are trained on pairs, the others on images")
    if not first.encoded:
        return
    for name in (*IDENTITY, *EDIT_IDENTITY):
        own, others = ((each.manifest.encoding or {}).get(name) for each in (first, other))
        if own != others:
            raise refuse(f"their {name} is", own, others, again)
    if first.prompt_width != other.prompt_width:
        raise refuse("their prompt embeddings are", f"{first.prompt_width} wide", other.prompt_width, again)
