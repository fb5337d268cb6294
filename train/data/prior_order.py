"""Subject and prior set in one stream of micro-batches, at a fixed share: each has an order of its own.

Micro-batch i of the global stream is the prior's where floor((i + 1)·share) > floor(i·share), else the subject's: integers
alone decide, so the stream is the same for every number of ranks, and after a resume. A micro-batch is of one bucket, and so
of one set: at batch size 1 without accumulation on one rank the share shows over the steps, not in each.
"""

import math
from fractions import Fraction

import numpy as np

from train.data.sample_order import Order


class PriorOrder:
    """The stream of both, with what a loader asks of an Order.

    Args:
        subject, prior: of samples of one data set, none of which both hold.
        share: of the micro-batches that are the prior's, above 0 and below 1.

    Attributes:
        length: micro-batches in which the subject's samples come once.
    """

    def __init__(self, subject: Order, prior: Order, share: Fraction) -> None:
        assert subject.samples == prior.samples and subject.batch_size == prior.batch_size and 0 < share < 1
        self.subject, self.prior, self.share = subject, prior, share
        self.samples, self.batch_size, self.seed = subject.samples, subject.batch_size, subject.seed
        self.length = float(subject.length / (1 - share))

    def micro_batches_of(self, epochs: float) -> int:
        """The fewest from the stream's beginning on that hold so many epochs of the subject."""
        needed = math.ceil(epochs * self.subject.length)
        return math.floor((needed - 1) / (1 - self.share)) + 1 if needed else 0

    def micro_batch(self, i: int) -> tuple[int, np.ndarray]:
        """Epoch, of the set that it belongs to, and virtual indices [B] of the i-th micro-batch of the global stream."""
        before = math.floor(i * self.share)
        if math.floor((i + 1) * self.share) > before:
            return self.prior.micro_batch(before)
        return self.subject.micro_batch(i - before)

    def micro_batches(self, start: int, count: int) -> np.ndarray:
        """Virtual indices [n, B] of `count` micro-batches from place `start` on, less what lies epochs ahead."""
        before = math.floor(start * self.share)
        up, down = self.share.numerator, self.share.denominator
        priors = np.array([i * up // down for i in range(start, start + count + 1)])
        of_prior = np.diff(priors) > 0
        parts = [
            (self.prior.micro_batches(before, int(of_prior.sum())), np.flatnonzero(of_prior)),
            (self.subject.micro_batches(start - before, int((~of_prior).sum())), np.flatnonzero(~of_prior)),
        ]
        places = np.concatenate([places[: len(virtual)] for virtual, places in parts])
        return np.concatenate([virtual for virtual, _ in parts])[np.argsort(places, kind="stable")]

    def micro_batches_by_bucket(self) -> dict[int, int]:
        """How many of the subject an epoch has, by bucket id."""
        return self.subject.micro_batches_by_bucket()

    def state(self) -> dict[str, object]:
        """As Order's: what, together with the data, determines the stream."""
        return self.subject.state() | {"prior": self.prior.state() | {"share": str(self.share)}}

    def summary(self) -> str:
        """For the console before step 0."""
        return (
            f"{self.subject.summary()}; prior: {self.prior.summary()}; {float(self.share):.4g} of the stream's micro-batches "
            "are of the prior"
        )
