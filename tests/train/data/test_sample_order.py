"""The plan's promises, over any sizes, buckets, worlds and batch sizes."""

import itertools
import warnings
from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from train.data.sample_order import AUTO_DROP_MICRO_BATCHES, Order, places, steps_of


@st.composite
def orders(draw, tails=("wrap", "drop", "auto")) -> tuple[Order, np.ndarray]:
    """Any order and the bucket of each sample."""
    bucket = np.array(draw(st.lists(st.sampled_from([0, 3, 4, 9]), min_size=1, max_size=60)), dtype=np.int32)
    shard = np.sort(np.array(draw(st.lists(st.integers(0, 7), min_size=len(bucket), max_size=len(bucket)))))
    members = None
    if draw(st.booleans()):
        held_out = draw(st.sets(st.integers(0, len(bucket) - 1), max_size=len(bucket) - 1))
        members = np.array(sorted(set(range(len(bucket))) - held_out))
    tail = draw(st.sampled_from(tails))
    options = {
        "batch_size": draw(st.integers(1, 5)),
        "seed": draw(st.integers(0, 2**63 - 1)),
        "window": draw(st.integers(1, 4)),
        "repeat": draw(st.integers(1, 3)),
    }
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            return Order(bucket, shard, tail=tail, members=members, **options), bucket
        except ValueError:  # drop leaves nothing: a case of its own below
            return Order(bucket, shard, tail="wrap", members=members, **options), bucket


def counts(order: Order, epoch: int) -> Counter:
    return Counter(order.locate(v)[0] for v in order.plan(epoch).ravel())


@given(orders(), st.integers(0, 50))
@settings(max_examples=150, deadline=None)
def test_an_epoch_is_complete_and_buckets_are_pure(case, epoch):
    order, bucket = case
    plan = order.plan(epoch)
    assert plan.shape == (order.length, order.batch_size)
    assert len(np.unique(plan)) == plan.size, "no two samples of an epoch share their noise"
    samples = plan % order.samples
    assert (bucket[samples] == bucket[samples[:, :1]]).all(), "a micro-batch mixes buckets"
    seen = counts(order, epoch)
    members = set(order._members.tolist())
    assert set(seen) <= members, "a held-out sample is trained on"
    if order.tail == "wrap":
        assert set(seen) == members and min(seen.values()) >= order.repeat
    if order.tail == "drop":
        assert max(seen.values()) <= order.repeat
    once = np.unique(order._members)
    assert plan.size == len(once) * order.repeat + order.wrapped - order.dropped
    if order.wrapped == 0 and order.dropped == 0:
        assert set(seen.values()) == {order.repeat}, "each sample once an epoch (times dataset_repeat)"


@given(orders(), st.integers(1, 6), st.integers(1, 4), st.integers(0, 30))
@settings(max_examples=100, deadline=None)
def test_every_split_of_the_global_batch_takes_the_same_micro_batches(case, world, accumulation, step):
    order, _ = case
    n, steps = world * accumulation, 3
    expected = list(range(step * n, (step + steps) * n))
    for w in (d for d in range(1, n + 1) if n % d == 0):
        ranks = [list(itertools.islice(places(step * n, r, w, n // w), steps * (n // w))) for r in range(w)]
        assert {len(r) for r in ranks} == {steps * (n // w)}, "unequal counts a rank"
        for s in range(steps):
            taken = sorted(i for r in ranks for i in r[s * (n // w) : (s + 1) * (n // w)])
            assert taken == expected[s * n : (s + 1) * n]
    for i in expected:
        epoch, indices = order.micro_batch(i)
        assert epoch == i // order.length and np.array_equal(indices, order.plan(epoch)[i % order.length])


@given(orders(), st.lists(st.integers(1, 9), min_size=1, max_size=5))
@settings(max_examples=60, deadline=None)
def test_changing_the_world_on_the_way_leaves_the_stream_alone(case, worlds):
    order, _ = case
    consumed, stream = 0, []
    for world in worlds:
        for _ in range(2):
            stream += [order.micro_batch(next(places(consumed, rank, world))) for rank in range(world)]
            consumed += world
    for i, (epoch, indices) in enumerate(stream):
        assert (epoch, indices.tolist()) == (order.micro_batch(i)[0], order.micro_batch(i)[1].tolist())


@given(orders(), st.integers(0, 500))
@settings(max_examples=60, deadline=None)
def test_seeking_gives_what_going_there_gives(case, i):
    order, _ = case
    walked = [order.micro_batch(k) for k in range(i % 40 + 1)][-1]
    fresh = Order.__new__(Order)
    fresh.__dict__ = {**order.__dict__, "_plans": type(order._plans)()}
    epoch, indices = fresh.micro_batch(i % 40)
    assert (epoch, indices.tolist()) == (walked[0], walked[1].tolist())


def test_the_order_is_pinned():
    """Golden: whoever changes the order breaks the resumption of every running training."""
    order = Order(np.array([0, 1] * 6), np.arange(12) // 4, batch_size=2, seed=7, window=2)
    assert order.plan(0).tolist() == PINNED
    assert order.plan(1).tolist() != PINNED
    assert Order(np.array([0, 1] * 6), np.arange(12) // 4, batch_size=2, seed=8, window=2).plan(0).tolist() != PINNED


PINNED = [[6, 10], [11, 7], [5, 9], [8, 4], [1, 3], [0, 2]]


def test_samples_of_a_window_stay_together():
    order = Order(np.zeros(4000, dtype=int), np.arange(4000) // 100, batch_size=4, window=5)
    for epoch in range(3):
        shards = order.plan(epoch) // 100
        eighth = shards.reshape(8, -1)
        assert [len(np.unique(window)) for window in eighth] == [5] * 8
        assert len(np.unique(eighth[:, :40])) > 20, "the order of the windows is not shuffled"


def test_the_shuffle_is_fair():
    """Each sample lands in each fifth of the epoch equally often (chi-square of 100 samples × 5 places, 400 epochs)."""
    order = Order(np.zeros(100, dtype=int), np.arange(100) // 10, batch_size=5, window=100)
    table = np.zeros((100, 5))
    for epoch in range(400):
        table[order.plan(epoch).ravel(), np.repeat(np.arange(5), 20)] += 1
    chi_square = ((table - 80) ** 2 / 80).sum()
    assert 300 < chi_square < 500  # mean 400, standard deviation 28


def test_auto_wraps_small_buckets_and_drops_the_tail_of_large_ones():
    large = AUTO_DROP_MICRO_BATCHES * 4 + 3
    bucket = np.array([0] * large + [1] * 3)
    order = Order(bucket, np.zeros(len(bucket), dtype=int), batch_size=4)
    assert (order.dropped, order.wrapped, order.lost_buckets) == (3, 1, [])
    assert set(counts(order, 0)) >= set(range(large, large + 3))
    assert counts(order, 0).keys() != counts(order, 1).keys(), "another tail is left out in each epoch"
    assert "3 left out" in order.summary() and "1 read again" in order.summary()


def test_drop_never_loses_a_bucket_silently():
    bucket = np.array([5] * 8 + [6] * 3)
    with pytest.warns(UserWarning, match=r"never trains 3 samples: 1 buckets .* \(ids \[6\]\)"):
        order = Order(bucket, np.zeros(11, dtype=int), batch_size=4, tail="drop")
    assert order.lost_buckets == [6]
    with pytest.raises(ValueError, match="fill no micro-batch of 9 with tail=drop"):
        Order(bucket, np.zeros(11, dtype=int), batch_size=9, tail="drop")


def test_a_bucket_of_one_wraps_to_a_full_batch_with_noise_of_its_own():
    order = Order(np.array([2]), np.array([0]), batch_size=3, repeat=2)
    assert order.length == 1
    assert len(set(order.plan(0)[0].tolist())) == 3
    assert [order.locate(v)[0] for v in order.plan(0)[0]] == [0, 0, 0]


@pytest.mark.parametrize(
    "options, message",
    [
        ({"batch_size": 0}, "batch_size must be at least 1, got 0"),
        ({"batch_size": 1, "repeat": 0}, "repeat must be at least 1"),
        ({"batch_size": 1, "seed": -1}, "seed must lie in"),
        ({"batch_size": 1, "tail": "keep"}, "tail must be one of auto, wrap, drop, got 'keep'"),
        ({"batch_size": 1, "members": np.array([], dtype=int)}, "0 samples"),
    ],
)
def test_wrong_arguments_are_named(options, message):
    with pytest.raises(ValueError, match=message):
        Order(np.zeros(3, dtype=int), np.zeros(3, dtype=int), **options)


def test_steps_of_epochs():
    assert steps_of(1, 10, 2, 2) == 3
    assert steps_of(2, 10, 2, 2) == 5
    assert steps_of(0.5, 10, 1, 1) == 5
