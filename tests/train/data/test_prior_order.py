"""Subject and prior in one stream: a fixed share along it, complete epochs of both, the same for every number of ranks."""

import itertools
import math
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from train.data.prior_order import PriorOrder
from train.data.remote_cache import shards_in_order
from train.data.sample_order import Order, places


@st.composite
def streams(draw) -> PriorOrder:
    count = draw(st.integers(2, 40))
    is_prior = np.array(draw(st.lists(st.booleans(), min_size=count, max_size=count)))
    is_prior[:2] = False, True
    bucket = np.array(draw(st.lists(st.sampled_from([0, 5]), min_size=count, max_size=count)))
    weight = np.array(draw(st.lists(st.sampled_from([1.0, 1.0, 0.5, 3.0]), min_size=count, max_size=count)))
    shard, batch, seed = np.arange(count) // 4, draw(st.integers(1, 3)), draw(st.integers(0, 2**40))
    subject, prior = (
        Order(bucket, shard, batch, seed, members=np.flatnonzero(chosen), weight=weight)
        for chosen in (~is_prior, is_prior)
    )
    share = draw(st.sampled_from([Fraction(1, 2), Fraction(1, 3), Fraction("0.1"), Fraction("0.37"), Fraction("0.9")]))
    return PriorOrder(subject, prior, share)


def is_prior(stream: PriorOrder, virtual: np.ndarray) -> bool:
    return int(virtual[0] % stream.samples) in stream.prior._members


@given(streams(), st.integers(0, 10**6))
@settings(max_examples=100, deadline=None)
def test_the_share_holds_along_the_stream(stream, start):
    """Of any n micro-batches n·share are the prior's, to within one; each set's own come in its own order, none left out."""
    taken = [stream.micro_batch(i) for i in range(start, start + 60)]
    priors = [is_prior(stream, virtual) for _, virtual in taken]
    for first, last in itertools.combinations(range(0, 61, 7), 2):
        assert abs(sum(priors[first:last]) - (last - first) * stream.share) < 1
    before = math.floor(start * stream.share)
    for kind, order, number in ((True, stream.prior, before), (False, stream.subject, start - before)):
        mine = [(epoch, v.tolist()) for (epoch, v), of_prior in zip(taken, priors, strict=True) if of_prior == kind]
        assert mine == [(epoch, v.tolist()) for epoch, v in map(order.micro_batch, range(number, number + len(mine)))]


@given(streams(), st.integers(1, 3))
@settings(max_examples=60, deadline=None)
def test_an_epoch_is_when_the_subject_is_through(stream, epochs):
    count = stream.micro_batches_of(epochs)
    kinds = [is_prior(stream, stream.micro_batch(i)[1]) for i in range(count)]
    assert kinds.count(False) == epochs * stream.subject.length and not kinds[-1], (
        "the fewest micro-batches that hold them"
    )
    assert stream.micro_batches_of(0) == 0 and count <= math.ceil(epochs * stream.length) + 1


@given(streams(), st.lists(st.integers(1, 5), min_size=1, max_size=4))
@settings(max_examples=40, deadline=None)
def test_ranks_that_change_on_the_way_take_the_same_stream(stream, worlds):
    consumed, taken = 0, []
    for world in worlds:
        ranks = [list(itertools.islice(places(consumed, rank, world, 2), 2)) for rank in range(world)]
        assert {len(each) for each in ranks} == {2}
        taken += sorted(i for each in ranks for i in each)
        consumed += 2 * world
    assert taken == list(range(consumed))


@given(streams(), st.integers(0, 500))
@settings(max_examples=40, deadline=None)
def test_what_comes_next_is_known_to_the_cache(stream, start):
    count = min(int(2 * stream.length), 30)
    ahead = stream.micro_batches(start, count)
    expected = [stream.micro_batch(i)[1].tolist() for i in range(start, start + count)]
    assert all(row in expected for row in ahead.tolist())
    if len(ahead) == count:
        assert ahead.tolist() == expected
    shard_of = np.where(np.isin(np.arange(stream.samples), stream.prior._members), np.arange(stream.samples) // 4, -1)
    assert set(shards_in_order(stream, shard_of, start, count)) <= set(shard_of[stream.prior._members].tolist())


def test_the_state_tells_the_share_and_both_orders():
    orders = [Order(np.zeros(4, int), np.zeros(4, int), 1, members=np.array(each)) for each in ([0, 1, 2], [3])]
    stream = PriorOrder(*orders, Fraction("0.25"))
    assert stream.state() == orders[0].state() | {"prior": orders[1].state() | {"share": "1/4"}}
    assert stream.length == pytest.approx(4) and "0.25 of the stream" in stream.summary()
