"""Several sets as one: places, buckets, weights, what is held out, what is refused, remote sets with their caches."""

import itertools
import json
import pickle
from collections import Counter
from dataclasses import replace
from pathlib import Path
from random import Random

import numpy as np
import pytest
import torch

from data_prep.encoding.caption_variants import CaptionOptions
from data_prep.shard_format.shards import MANIFEST, read_manifest
from tests.helpers.data_sets import assert_equal, break_sample, embeds_of, give_weights, latent_of, write_set
from train.data.batch import make_batch
from train.data.mixture import Member, Mixture, padded_variants, without_subject
from train.data.sample import BrokenSample
from train.data.sample_order import Order
from train.data.shard_dataset import ShardDataset
from train.flow.timestep_sampling import SigmaSampling
from train.loader.indexed_loader import BatchLoader, draw_sample
from train.loader.worker_loader import Reading


def mixture(tmp_path: Path, counts: tuple[int, ...] = (12, 7), payload: str = "safetensors", **options) -> Mixture:
    """Sets of so many samples; the second of weight 0.5."""
    for number, count in enumerate(counts):
        if not (tmp_path / str(number)).exists():
            write_set(tmp_path / str(number), count, payload)
    weights = (1.0, 0.5, 3.0)
    return Mixture([Member(ShardDataset(tmp_path / str(n)), weights[n]) for n in range(len(counts))], **options)


def draws(epoch: int, index: int, shape: tuple[int, ...]):
    return draw_sample(0, SigmaSampling(), 0.0, epoch, index, shape)


def test_samples_of_all_sets_stand_one_behind_the_other(tmp_path):
    both = pickle.loads(pickle.dumps(mixture(tmp_path)))
    assert len(both) == 19 and [len(part.samples) for part in both.parts] == [12, 7]
    for index in range(19):
        number = index if index < 12 else index - 12
        sample = both.read(index)
        assert sample.index == index and sample.caption == f"caption {number} é" and not sample.prior
        assert torch.equal(sample.latent, latent_of(number)) and torch.equal(sample.prompt_embeds, embeds_of(number))
        assert both.source(index) == f"photos/{number}.jpg" and both.size(index) == (sample.width, sample.height)
    assert both.index.weight.tolist() == [1.0] * 12 + [0.5] * 7
    assert [shard.samples for shard in both.manifest.shards] == [5, 5, 2, 5, 2] and both.index.shard.max() == 4


def test_buckets_of_one_size_are_one_and_batches_hold_samples_of_several_sets(tmp_path):
    both = mixture(tmp_path)
    assert [(b.width, b.height, b.count) for b in both.manifest.buckets] == [(16, 32, 9), (32, 16, 10)]
    for bucket in both.manifest.buckets:
        members = np.flatnonzero(both.index.bucket == bucket.id)
        assert len(members) == bucket.count and {both.size(i) for i in members} == {(bucket.width, bucket.height)}
    order = both.order(2)
    assert any(len({index < 12 for index in row % 19}) == 2 for row in order.plan(0))
    batch = make_batch(both, 0, 0, [0, 12], draws)
    assert batch.latents is not None and batch.prior is None and batch.loss_weight is None
    others = list(both.same_bucket(14))
    assert {both.size(i) for i in others} == {both.size(14)} and 14 not in others and len(others) == 9
    assert {both.size(i) for i in both.other_buckets(14)} == {both.size(15)}


def test_weights_of_sets_and_samples_multiply(tmp_path):
    give_weights(write_set(tmp_path / "1", 7), [4.0] + [1.0] * 6)
    both = mixture(tmp_path)
    assert both.index.weight.tolist() == [1.0] * 12 + [2.0] + [0.5] * 6
    came: Counter[int] = Counter()
    for epoch in range(40):
        came.update((both.order(1).plan(epoch).ravel() % 19).tolist())
    # 9.5 and 7.5 an epoch in batches of one are 10 and 8 micro-batches: some come once more, all in the ratio of their weights.
    assert all(40 * w - 2 <= came[i] <= 48 * w + 5 for i, w in enumerate(both.index.weight)), came


def test_a_weighted_set_alone_follows_its_weights(tmp_path):
    folder = give_weights(write_set(tmp_path / "a"), [3.0, 1.0] * 6)
    order = ShardDataset(folder).order(1)
    assert order.length == 24 and "weights" in order.state()
    came = np.bincount(order.plan(0).ravel() % 12, minlength=12)
    assert came.tolist() == [3, 1] * 6


def test_held_out_over_all_and_every_sample_of_one_name_on_one_side(tmp_path):
    """photos/0.jpg … lie in both sets: an image that is validated isn't trained from the other one."""
    both = mixture(tmp_path, validation_samples=3)
    names = [both.source(i) for i in range(19)]
    held = {names[i] for i in both.validation}
    assert len(both.validation) >= 3 and not held & {names[i] for i in both.training}
    assert sorted([*both.validation, *both.training]) == list(range(19))
    subset = both.training_subset(4)
    assert len(subset) >= 4 and not set(subset) & set(both.validation) and set(subset) <= set(both.training)
    alone = ShardDataset(tmp_path / "0", 1)
    assert alone.source(alone.validation[0]) in held, "the same names as without the other set"
    with pytest.raises(ValueError, match="nothing is left to train on"):
        mixture(tmp_path, validation_samples=19)


def test_the_fingerprint_tells_sets_weights_and_order(tmp_path):
    for number, count in enumerate((12, 7)):
        folder = write_set(tmp_path / str(number), count)
        fields = json.loads((folder / MANIFEST).read_text())
        (folder / MANIFEST).write_text(json.dumps(fields | {"fingerprint": str(number)}))
    a, b = ShardDataset(tmp_path / "0"), ShardDataset(tmp_path / "1")
    kinds = [
        [Member(a), Member(b)],
        [Member(b), Member(a)],
        [Member(a), Member(b, 2)],
        [Member(a), Member(b, 1, prior=True)],
        [Member(a, 2)],
    ]
    prints = [Mixture(members).fingerprint for members in kinds]
    assert len(set(prints)) == 5 and Mixture(kinds[0]).fingerprint == prints[0]


def test_prior_samples_are_told_apart_and_never_validated(tmp_path):
    write_set(tmp_path / "a"), write_set(tmp_path / "b", 7)
    sets = [Member(ShardDataset(tmp_path / "a")), Member(ShardDataset(tmp_path / "b"), prior=True)]
    both = Mixture(sets, 4, prior_weight=0.25)
    assert both.prior.tolist() == list(range(12, 19)) and set(both.validation) < set(range(12))
    assert set(both.prior) <= set(both.training) and not set(both.training_subset(20)) & set(both.prior)
    subject, prior = both.order(1), both.prior_order(1)
    assert set((subject.plan(0) % 19).ravel()) == set(range(12)) - set(both.validation)
    assert set((prior.plan(0) % 19).ravel()) == set(range(12, 19))
    batch = make_batch(both, 0, 0, [13, 15], draws)
    assert batch.prior.tolist() == [True, True] and batch.loss_weight.tolist() == [0.25, 0.25]
    plain = make_batch(both, 0, 0, [1, 3], draws)
    assert plain.prior is None and plain.loss_weight is None
    assert set(both.same_bucket(13)) == {15, 17} and max(both.same_bucket(1)) < 12, "neighbors are of one kind"
    assert set(both.other_buckets(13)) == {12, 14, 16, 18}
    assert [(part.name, part.prior) for part in both.parts] == [
        (str(tmp_path / "a"), False),
        (str(tmp_path / "b"), True),
    ]


def test_a_broken_sample_gives_way_to_one_of_its_kind(tmp_path):
    write_set(tmp_path / "a"), write_set(tmp_path / "b", 7)
    break_sample(tmp_path / "b", 1)
    both = Mixture([Member(ShardDataset(tmp_path / "a")), Member(ShardDataset(tmp_path / "b"), prior=True)])
    with pytest.raises(BrokenSample, match=r"in .*/b/"):
        both.read(13)
    batch = make_batch(both, 0, 0, [13], draws)
    assert batch.captions == ["caption 3 é"] and batch.prior.tolist() == [True] and len(batch.broken) == 1


def test_shards_that_were_edited_are_found_in_every_set(tmp_path):
    both, said = mixture(tmp_path), []
    states = both.shard_states()
    assert set(states) == {*(f"0/00000{i}.tar" for i in range(3)), *(f"1/00000{i}.tar" for i in range(2))}
    both.check_unchanged(states, said.append)
    with (tmp_path / "1" / "000001.tar").open("r+b") as file:
        file.seek(600)
        file.write(b"edited")
    with pytest.raises(ValueError, match=r"1 of 2 shards in .*/1 were edited"):
        both.check_unchanged(states, said.append)


@pytest.mark.parametrize("kind", ["payload", "width", "encoder", "pairs"])
def test_sets_that_do_not_go_together_are_refused_by_name(tmp_path, kind):
    write_set(tmp_path / "a"), write_set(tmp_path / "b", payload="png" if kind == "payload" else "safetensors")
    a, b = ShardDataset(tmp_path / "a"), ShardDataset(tmp_path / "b")
    if kind == "width":
        b.prompt_width = 16
    elif kind == "pairs":
        b.paired = True
    elif kind == "encoder":
        b.manifest = type(b.manifest)(**vars(b.manifest) | {"encoding": {"vae": "another"}})
    what = {
        "payload": "they hold encoded samples and images; encode the images",
        "width": "their prompt embeddings are 8 wide and 16",
        "encoder": "their vae is None and another; encode both with the same",
        "pairs": "they hold single images and pairs",
    }[kind]
    with pytest.raises(ValueError, match=f"data: .*/a and .*/b cannot be trained together: {what}"):
        Mixture([Member(a), Member(b)])


@pytest.mark.parametrize("workers", [0, 2])
def test_remote_sets_give_the_same_batches_each_from_its_cache(tmp_path, request, workers):
    """Two sets in fsspec's memory filesystem would not outlive a fork: one is a file:// address, the other lies here."""
    here = mixture(tmp_path)
    members = [
        Member(ShardDataset(f"file://{tmp_path}/0", cache_folder=tmp_path / "cache")),
        Member(ShardDataset(tmp_path / "1"), 0.5),
    ]
    far = Mixture(members)
    ((reader, shard_of),) = far.remote_shards()
    assert shard_of.tolist() == [*([0] * 5), *([1] * 5), 2, 2, *([-1] * 7)] and reader.folder.is_relative_to(
        tmp_path / "cache"
    )
    assert here.remote_shards() == [] and far.fingerprint == here.fingerprint
    reading = Reading(num_workers=workers)
    with (
        BatchLoader(far, far.order(2), SigmaSampling(), reading, 10**9) as there,
        BatchLoader(here, here.order(2), SigmaSampling(), reading) as near,
    ):
        for a, b in itertools.islice(zip(there, near, strict=True), 30):
            assert_equal(a, b)
        end = len(list(reader.folder.glob("*.tar")))
    assert end > 0, "nothing was copied ahead"
    assert read_manifest(reader.folder).totals["samples"] == 12


def test_an_order_over_one_set_is_what_it_was(tmp_path):
    """A single set of weight 1 is no mixture; its order is pinned in test_sample_order.py."""
    dataset = ShardDataset(write_set(tmp_path / "a"))
    i = dataset.index
    assert np.array_equal(dataset.order(2, seed=3).plan(1), Order(i.bucket, i.shard, 2, 3).plan(1))
    assert dataset.order(2).state().keys() == Order(i.bucket, i.shard, 2).state().keys()


def test_the_prior_s_captions_never_name_the_subject(tmp_path):
    write_set(tmp_path / "a", payload="png"), write_set(tmp_path / "b", 7, payload="png")
    captions = CaptionOptions(trigger_word="zwx", caption_prefix="a", caption_suffix="b", caption_shuffle_tags=True)
    sets = [
        Member(ShardDataset(tmp_path / "a", captions=captions)),
        Member(ShardDataset(tmp_path / "b", captions=without_subject(captions)), prior=True),
    ]
    both = Mixture(sets)
    assert both.read(1).caption == "zwx, a caption 1 é b" and both.read(13).caption == "caption 1 é"
    assert both.captions is captions
    batch = make_batch(both, 0, 0, [13, 15], draws, caption_chance=caption_chance_of_seed)
    assert batch.captions == ["caption 1 é", "caption 3 é"]


def caption_chance_of_seed(epoch: int, index: int) -> Random:
    return Random(f"{epoch} {index}")


def test_sets_with_and_without_caption_variants_stand_side_by_side(tmp_path):
    """Of one without, its one caption's tokens count as those of its one variant."""
    a, b = ShardDataset(write_set(tmp_path / "a", 3)), ShardDataset(write_set(tmp_path / "b", 2))
    a.index = replace(a.index, variant_tokens=np.array([[4, 5], [6, 0], [7, 7]], np.int32))
    b.index = replace(b.index, prompt_tokens=np.array([8, 9], np.int32))
    assert padded_variants(b.index, 0).shape == (2, 0)
    assert Mixture([Member(a), Member(b)]).index.variant_tokens.tolist() == [[4, 5], [6, 0], [7, 7], [8, 0], [9, 0]]
