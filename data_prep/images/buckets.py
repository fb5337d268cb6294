"""Aspect-ratio buckets: from an image's size to the size it is stored in. Integers and fractions only.

A bucket is (width, height) in pixels, both multiples of `step`, area at most that of its target. An image goes into the
bucket of the nearest aspect ratio (|log ratio| distance), is scaled until it covers it, and its overhang is cropped
evenly from both ends. A target that would need enlarging is passed over for a smaller one.

Images of pairs are stretched instead, whole, to the size that inference itself stretches source images to: so nothing is
shifted between a target and a source of one size, nor between training and inference.
"""

from __future__ import annotations

import bisect
import functools
import math
from dataclasses import dataclass
from fractions import Fraction

from qwen_image.model.family import SOURCE_STEP, source_size

# Side of the square targets below the smallest one asked for, which take images too small for it. Finer steps keep more
# pixels, but spread a small data set over more buckets, and a batch is always of one bucket.
SMALLER_SIDE_STEP = 64


@dataclass(frozen=True)
class BucketOptions:
    """How sizes are chosen. Either `fixed`, or targets by area."""

    areas: tuple[int, ...] = (1024 * 1024,)  # pixels; every bucket has at most the area of its target
    step: int = 16  # sides are multiples of it: the VAE's 8 times the transformer's patches of 2, or more
    fixed: tuple[int, int] | None = None  # (width, height): one bucket for all
    max_upscale: Fraction = Fraction(1)  # an image is never enlarged by more than this
    max_aspect_ratio: Fraction = Fraction(4)  # long side : short side, of images and of buckets
    stretch: bool = False  # images of pairs: whole, to inference's own sizes
    every_area: bool = False  # an image is stored once for each of `areas` that it fills

    def __post_init__(self) -> None:
        if self.step < 16 or self.step % 16:
            raise ValueError(f"--bucket_step {self.step}: must be a multiple of 16 (16, 32 or 64)")
        if self.fixed is not None:
            for name, side in zip(("width", "height"), self.fixed, strict=True):
                if side < 16 or side % 16:
                    near = max(16, (side + 8) // 16 * 16)
                    raise ValueError(f"--{name} {side}: must be a multiple of 16, for instance {near}")
        elif not self.areas or min(self.areas) < self.step**2:
            raise ValueError(f"target areas {self.areas} pixels: each must be at least {self.step} x {self.step}")
        if self.max_upscale <= 0:
            raise ValueError(f"--max_upscale {float(self.max_upscale)}: must be above 0")
        if self.max_aspect_ratio < 1:
            raise ValueError(f"--max_aspect_ratio {float(self.max_aspect_ratio)}: must be at least 1")


@dataclass(frozen=True)
class Placement:
    """Where an upright image goes: its crop box in its own pixels, and the bucket that the box is scaled to."""

    width: int
    height: int
    crop_left: int
    crop_top: int
    crop_width: int
    crop_height: int


@functools.lru_cache(maxsize=256)
def bucket_table(area: int, step: int, max_aspect_ratio: Fraction) -> tuple[tuple[int, int], ...]:
    """All buckets (width, height) of one target area, narrow to wide; closed under exchange of width and height.

    For each width the greatest height with width * height <= area, and the same with the sides exchanged.
    """
    longest = math.isqrt(math.ceil(area * max_aspect_ratio))
    table = set()
    for long in range(step, longest + 1, step):
        short = area // long // step * step
        if 0 < short <= long <= short * max_aspect_ratio:
            table |= {(long, short), (short, long)}
    if not table:  # the area is so small that no bucket but the square fits
        side = math.isqrt(area) // step * step
        table.add((side, side))
    return tuple(sorted(table, key=lambda bucket: (_ratio(bucket), bucket[0])))


def nearest_bucket(width: int, height: int, table: tuple[tuple[int, int], ...]) -> tuple[int, int]:
    """The bucket whose ratio is nearest in log space; the narrower one on a tie, the largest of those of one ratio.

    `table` is sorted as `bucket_table` gives it. log distance is compared as max(W h, H w) / min(W h, H w), exactly.
    """
    ratio = Fraction(width, height)
    right = bisect.bisect_right(table, ratio, key=_ratio)
    candidates = [table[right - 1]] if right else []
    if right < len(table):
        last_of_ratio = bisect.bisect_right(table, _ratio(table[right]), lo=right, key=_ratio)
        candidates.append(table[last_of_ratio - 1])

    def distance(bucket: tuple[int, int]) -> Fraction:
        a, b = width * bucket[1], height * bucket[0]
        return Fraction(max(a, b), min(a, b))

    return min(candidates, key=distance)


@functools.lru_cache(maxsize=65536)
def _ratio(bucket: tuple[int, int]) -> Fraction:
    return Fraction(*bucket)


def upscale(width: int, height: int, bucket: tuple[int, int]) -> Fraction:
    """Factor by which a W x H image is scaled so that it just covers the bucket; above 1 it is enlarged."""
    return max(Fraction(bucket[0], width), Fraction(bucket[1], height))


def cover_box(width: int, height: int, bucket: tuple[int, int]) -> tuple[int, int, int, int]:
    """Centred box (left, top, width, height) of a W x H image that has the bucket's ratio to within half a pixel."""
    if width * bucket[1] <= height * bucket[0]:  # relatively narrower than the bucket: all of the width
        box_width, box_height = width, min(height, max(1, _round_divide(width * bucket[1], bucket[0])))
    else:
        box_width, box_height = min(width, max(1, _round_divide(height * bucket[0], bucket[1]))), height
    return (width - box_width) // 2, (height - box_height) // 2, box_width, box_height


@functools.lru_cache(maxsize=4096)
def place(width: int, height: int, options: BucketOptions) -> Placement | None:
    """Bucket and crop box of an upright image; None when it would have to be enlarged beyond `max_upscale`."""
    assert width > 0 and height > 0, f"image of {width} x {height}"
    if options.stretch:
        return _stretched(width, height, options)
    if options.fixed is not None:
        bucket = options.fixed if upscale(width, height, options.fixed) <= options.max_upscale else None
    else:
        bucket = _largest_covered(width, height, options)
    return bucket and Placement(*bucket, *cover_box(width, height, bucket))


def places(width: int, height: int, options: BucketOptions) -> list[tuple[int, Placement]]:
    """Where an image goes, each with its target area: once, or with `every_area` once for each of `areas` that it fills.

    Largest first. An area of 0 stands for what `place` says, and is all that there is of an image that fills none; of areas
    that share a bucket for this image the first is taken.
    """
    found: dict[tuple[int, int], tuple[int, Placement]] = {}
    for area in sorted(options.areas, reverse=True) if options.every_area and options.fixed is None else ():
        placement = _at_area(width, height, area, options)
        if placement is not None:
            found.setdefault((placement.width, placement.height), (area, placement))
    if not found and (placement := place(width, height, options)) is not None:
        return [(0, placement)]
    return list(found.values())


def _at_area(width: int, height: int, area: int, options: BucketOptions) -> Placement | None:
    """For this target area alone; None where the image would have to be enlarged beyond `max_upscale`."""
    if options.stretch:
        bucket = source_size(area, width, height)
        box = 0, 0, width, height
    else:
        bucket = nearest_bucket(width, height, bucket_table(area, options.step, options.max_aspect_ratio))
        box = cover_box(width, height, bucket)
    return Placement(*bucket, *box) if upscale(width, height, bucket) <= options.max_upscale else None


def _stretched(width: int, height: int, options: BucketOptions) -> Placement | None:
    """The whole image in the largest size of its ratio that needs no enlarging beyond `max_upscale`."""
    sizes = [source_size(area, width, height) for area in sorted(options.areas, reverse=True)]
    for size in sizes if options.fixed is None else [options.fixed]:
        if upscale(width, height, size) <= options.max_upscale or size == (SOURCE_STEP, SOURCE_STEP):
            return Placement(*size, 0, 0, width, height)
    return None


def _largest_covered(width: int, height: int, options: BucketOptions) -> tuple[int, int] | None:
    smallest = math.isqrt(min(options.areas))
    smaller = (
        side * side for side in range((smallest - 1) // SMALLER_SIDE_STEP * SMALLER_SIDE_STEP, 0, -SMALLER_SIDE_STEP)
    )
    for area in (*sorted(options.areas, reverse=True), *smaller):
        if area < options.step**2:
            break
        bucket = nearest_bucket(width, height, bucket_table(area, options.step, options.max_aspect_ratio))
        if upscale(width, height, bucket) <= options.max_upscale:
            return bucket
    return None


def _round_divide(a: int, b: int) -> int:
    """a / b, rounded to the nearest integer, halves up."""
    return (2 * a + b) // (2 * b)
