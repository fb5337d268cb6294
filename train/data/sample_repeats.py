"""How often each sample comes in an epoch: the whole part of its weight always, the rest as often as it comes to.

A weight of 2.25 is two times in every epoch and a third time in every fourth one, on average. Which samples those are is a
function of (seed, epoch), drawn by systematic sampling: the fractions of all samples are laid end to end in one random order,
and the samples are taken into which the points u, u + 1, u + 2 … fall. So any run of samples of this line, a bucket for
instance, gets its share to within one sample in each epoch. u moves on by the golden ratio from one epoch to the next
(Weyl's sequence), so that every sample's share is nearly right after few epochs and exactly right in the long run.

Integers only: the same on every machine.
"""

import hashlib

import numpy as np

# A weight is a whole number of these: exact for three decimals, and for all fractions with denominators up to 16.
GRID = 18_018_000
STEP = 11_135_737  # the golden ratio's 0.618… of GRID, and prime to it: u comes to every place before it comes again
MOST = 2**31  # repeats of one sample in an epoch


class Repeats:
    """How often each of N samples comes in each epoch.

    Args:
        weight: float [N], above 0: repeats an epoch, on average.
        bucket: int [N], from 0, all numbers below `buckets` occur.
        repeat: all weights are multiplied by it.
        seed: of the line's order and of where u begins; the draws are none of the order's own.

    Attributes:
        total: int64 [buckets], mean repeats of a bucket in an epoch, in units of 1 / GRID.
        most: no sample comes more often in an epoch.

    Raises:
        ValueError: a weight that is not above 0 or not finite, or more than MOST repeats.
    """

    def __init__(self, weight: np.ndarray, bucket: np.ndarray, buckets: int, repeat: int, seed: int) -> None:
        most = float(weight.max(initial=1.0)) * repeat
        if not (np.isfinite(weight).all() and (weight > 0).all() and most <= MOST):
            raise ValueError(f"weights must be above 0, and with dataset_repeat {repeat} at most {MOST}, got {most:g}")
        units = np.maximum(np.rint(weight * GRID), 1).astype(np.int64) * repeat
        self.digest = hashlib.sha256(units.tobytes()).hexdigest()[:16]
        self._whole, self._rest = np.divmod(units, GRID)
        self._bucket, self._buckets = bucket, buckets
        self.total = np.zeros(buckets, np.int64)
        np.add.at(self.total, bucket, units)
        self.most = int(-(-units.max(initial=GRID) // GRID))
        key = hashlib.blake2b(f"repeats/{seed}".encode(), digest_size=16).digest()
        words = np.random.Philox(key=np.frombuffer(key, dtype="<u8")).random_raw
        shuffled = np.argsort(words(len(weight)), kind="stable")
        self._line = shuffled[np.argsort(bucket[shuffled], kind="stable")]
        self._ends = np.cumsum(self._rest[self._line])
        self._start = int(words() % GRID)

    def of(self, epoch: int) -> np.ndarray:
        """int64 [N]; at least one in every bucket, whatever its weights."""
        u = (self._start + epoch * STEP) % GRID
        points = (self._ends - 1 - u) // GRID  # so many of the points lie before the end of each
        before = np.concatenate([[(-1 - u) // GRID], points[:-1]])
        found = self._whole.copy()
        found[self._line] += points - before
        times = np.bincount(self._bucket, weights=found, minlength=self._buckets)
        for empty in np.flatnonzero(times == 0):  # its micro-batches have to be made of something
            members = self._line[self._bucket[self._line] == empty]
            found[members[epoch % len(members)]] = 1
        return found

    def counts(self, tail: str) -> np.ndarray:
        """int64 [buckets]: the repeats that a bucket's micro-batches are counted for, the same in every epoch.

        `wrap` holds whatever comes, `drop` what comes at least, `auto` is the nearest, and at least one.
        """
        if tail == "wrap":
            return -(-self.total // GRID)
        return self.total // GRID if tail == "drop" else np.maximum((2 * self.total + GRID) // (2 * GRID), 1)
