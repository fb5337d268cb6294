"""Weights of samples: what an epoch holds of each, over any weights, buckets, batch sizes and seeds."""

from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from train.data.sample_order import Order
from train.data.sample_repeats import GRID, STEP, Repeats

WEIGHTS = st.one_of(
    st.sampled_from([1.0, 2.0, 10.0, 0.5, 0.1, 0.25, 1 / 3, 1.75]), st.floats(0.01, 5.0).map(lambda w: round(w, 3))
)


@st.composite
def repeats(draw) -> tuple[Repeats, np.ndarray, np.ndarray]:
    """With the mean repeats of each sample and its bucket."""
    weight = np.array(draw(st.lists(WEIGHTS, min_size=1, max_size=40)))
    count = draw(st.integers(1, 3))
    bucket = np.array(draw(st.lists(st.integers(0, count - 1), min_size=len(weight), max_size=len(weight))))
    _, bucket = np.unique(bucket, return_inverse=True)
    repeat = draw(st.integers(1, 3))
    found = Repeats(weight, bucket, int(bucket.max()) + 1, repeat, draw(st.integers(0, 2**63 - 1)))
    return found, weight * repeat, bucket


@given(repeats(), st.integers(0, 10**6))
@settings(max_examples=200, deadline=None)
def test_an_epoch_holds_the_whole_part_of_each_and_a_bucket_its_share_to_within_one(case, epoch):
    found, mean, bucket = case
    times = found.of(epoch)
    assert np.array_equal(times, found.of(epoch))
    whole = np.floor(mean + 1e-6).astype(int)
    filled = np.bincount(bucket, weights=mean) >= 1
    assert (times >= whole).all() and (times <= whole + 1).all() and times.max() <= found.most
    for number, total in enumerate(np.bincount(bucket, weights=mean)):
        came = times[bucket == number].sum()
        assert came in ({np.floor(total + 1e-6), np.ceil(total - 1e-6)} if filled[number] else {1})


@given(repeats())
@settings(max_examples=40, deadline=None)
def test_every_sample_comes_as_often_as_its_weight_says(case):
    """To within two times, over 200 epochs: far nearer than independent draws, whose standard deviation is up to 7."""
    found, mean, bucket = case
    came = sum(found.of(epoch) for epoch in range(200))
    trained = (np.bincount(bucket, weights=mean) >= 1)[bucket]  # a bucket below one sample an epoch still fills a batch
    assert (np.abs(came - 200 * mean)[trained] <= 2 + 200 * mean[trained] * 1e-6).all()


def test_two_halves_take_turns_and_in_another_company_each_seed():
    found = Repeats(np.full(1000, 0.5), np.zeros(1000, int), 1, 1, seed=3)
    first = found.of(0)
    assert first.sum() == 500 and not np.array_equal(
        first, Repeats(np.full(1000, 0.5), np.zeros(1000, int), 1, 1, 4).of(0)
    )
    assert 200 < (first[:500]).sum() < 300, "the order of the folder decides"
    both = np.array([found.of(epoch) for epoch in range(8)]).sum(0)
    assert both.min() >= 3 and both.max() <= 5


def test_the_grid_holds_the_weights_that_people_write():
    for weight in (0.1, 0.5, 0.125, 0.001, 1 / 3, 5 / 7, 2.375):
        assert abs(weight * GRID - round(weight * GRID)) < 1e-6
    assert np.gcd(GRID, STEP) == 1


def test_the_draw_is_pinned():
    """Golden: whoever changes it breaks the resumption of every running training with weights."""
    found = Repeats(np.array([0.5, 1.5, 0.25, 2.0, 0.75, 1.0]), np.array([0, 0, 0, 1, 1, 1]), 2, 1, seed=7)
    assert [found.of(epoch).tolist() for epoch in range(4)] == PINNED


PINNED = [[0, 2, 0, 2, 1, 1], [1, 1, 0, 2, 1, 1], [0, 2, 0, 2, 1, 1], [0, 2, 0, 2, 1, 1]]


@pytest.mark.parametrize("weight", [0.0, -1.0, float("nan"), float("inf"), 1e12])
def test_what_is_no_weight_is_refused(weight):
    with pytest.raises(ValueError, match="weights must be above 0"):
        Repeats(np.array([1.0, weight]), np.zeros(2, int), 1, 1, 0)


# ── in the order ─────────────────────────────────────────────────────────────────────────────────────────────────────


@st.composite
def weighted_orders(draw) -> tuple[Order, np.ndarray, np.ndarray]:
    weight = np.array(draw(st.lists(WEIGHTS, min_size=1, max_size=40)))
    bucket = np.array(draw(st.lists(st.sampled_from([0, 3, 9]), min_size=len(weight), max_size=len(weight))))
    shard = np.sort(np.array(draw(st.lists(st.integers(0, 5), min_size=len(weight), max_size=len(weight)))))
    options = {"batch_size": draw(st.integers(1, 4)), "seed": draw(st.integers(0, 2**63 - 1)), "window": 6}
    tail = draw(st.sampled_from(["wrap", "auto"]))
    repeat = draw(st.integers(1, 3))
    return Order(bucket, shard, tail=tail, repeat=repeat, weight=weight, **options), weight * repeat, bucket


@given(weighted_orders(), st.integers(0, 100))
@settings(max_examples=150, deadline=None)
def test_the_plan_of_a_weighted_epoch_is_whole(case, epoch):
    """M is constant, buckets are pure, no two cells share their noise, and with `wrap` nothing that is due is left out."""
    order, mean, bucket = case
    plan = order.plan(epoch)
    assert plan.shape == (order.length, order.batch_size) == order.plan(epoch + 1).shape
    assert len(np.unique(plan)) == plan.size
    samples = plan % order.samples
    assert (bucket[samples] == bucket[samples[:, :1]]).all()
    rows = Counter(bucket[samples[:, 0]].tolist())
    assert rows == order.micro_batches_by_bucket()
    if order.tail == "wrap":
        came = np.bincount(samples.ravel(), minlength=len(mean))
        assert (came >= np.floor(mean + 1e-6)).all()


@given(weighted_orders())
@settings(max_examples=30, deadline=None)
def test_over_epochs_samples_of_a_bucket_come_in_the_ratio_of_their_weights(case):
    """What fills micro-batches up, or is left over, hits all samples of a bucket alike."""
    order, mean, bucket = case
    epochs = 150
    came = np.zeros(len(mean))
    for epoch in range(epochs):
        came += np.bincount(order.plan(epoch).ravel() % order.samples, minlength=len(mean))
    for number, rows in order.micro_batches_by_bucket().items():
        members = bucket == number
        if mean[members].sum() < 1:
            continue
        expected = epochs * rows * order.batch_size * mean[members] / mean[members].sum()
        assert (np.abs(came[members] - expected) <= 5 + 4 * np.sqrt(expected)).all()


def test_batches_of_one_follow_whole_counts_exactly():
    """Ten images that count ten times and one hundred others: an epoch of 200, each as often as its folder says."""
    weight = np.array([10.0] * 10 + [1.0] * 100)
    order = Order(np.zeros(110, int), np.arange(110) // 20, batch_size=1, weight=weight)
    assert (order.length, order.wrapped, order.dropped, order.repeats) == (200, 0, 0, 200)
    for epoch in range(3):
        assert np.bincount(order.plan(epoch).ravel() % 110).tolist() == weight.tolist()
    assert (
        "110 samples, by their weights 200 an epoch, in 1 buckets: 200 micro-batches of 1 an epoch" in order.summary()
    )


def test_weights_of_one_change_nothing():
    bucket, shard = np.array([0, 1] * 30), np.arange(60) // 7
    plain = Order(bucket, shard, batch_size=4, seed=5, repeat=2)
    weighted = Order(bucket, shard, batch_size=4, seed=5, repeat=2, weight=np.ones(60))
    assert plain.state() == weighted.state() and "weights" not in plain.state()
    assert np.array_equal(plain.plan(3), weighted.plan(3))
    other = Order(bucket, shard, batch_size=4, seed=5, repeat=2, weight=np.full(60, 0.5))
    assert other.state() != plain.state() and other.length == 16, "30 of each bucket in batches of 4"


def test_a_few_of_a_large_bucket_come_though_their_share_of_it_is_below_one():
    """Three images of weight 0.1 among fifty: rounding their 0.3 away would never train them."""
    weight = np.array([1.0] * 50 + [0.1] * 3)
    order = Order(np.zeros(53, int), np.zeros(53, int), batch_size=1, weight=weight)
    came = np.zeros(53)
    for epoch in range(400):
        came += np.bincount(order.plan(epoch).ravel() % 53, minlength=53)
    assert came[50:] == pytest.approx(40, abs=8) and came[:50] == pytest.approx(400, abs=12)


def test_members_alone_have_repeats():
    """Held-out samples come never, whatever they weigh."""
    order = Order(
        np.zeros(6, int), np.zeros(6, int), 1, members=np.array([1, 2, 4]), weight=np.array([9, 2, 1, 9, 0.5, 9])
    )
    for epoch in range(4):
        assert set(order.plan(epoch).ravel() % 6) <= {1, 2, 4}
