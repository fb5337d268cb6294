"""Buckets: properties over many sizes, and a few known answers."""

from __future__ import annotations

import math
from fractions import Fraction

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from data_prep.images.buckets import BucketOptions, bucket_table, cover_box, nearest_bucket, place, upscale

SIDES = st.integers(1, 12000)
OPTIONS = st.builds(
    BucketOptions,
    areas=st.lists(st.sampled_from([256**2, 512**2, 768**2, 1024**2, 1328**2]), min_size=1, unique=True).map(tuple),
    step=st.sampled_from([16, 32, 64]),
    max_upscale=st.sampled_from([Fraction(1), Fraction("1.5"), Fraction(3)]),
    max_aspect_ratio=st.sampled_from([Fraction(1), Fraction("2.5"), Fraction(4)]),
)


@given(area=st.integers(64**2, 2048**2), step=st.sampled_from([16, 32, 64]), ratio=st.sampled_from([1, 2, 4, 9]))
@settings(max_examples=60, deadline=None)
def test_table(area: int, step: int, ratio: int) -> None:
    table = bucket_table(area, step, Fraction(ratio))
    assert table
    for width, height in table:
        assert width % step == height % step == 0 and width * height <= area
        assert max(width, height) <= ratio * min(width, height)
        assert (height, width) in table
        # No room for another step on the shorter side, or the step would make it the longer side of too long a shape.
        short, long = sorted((width, height))
        assert width * height + long * step >= area or short + step > ratio * long
    assert list(table) == sorted(table, key=lambda bucket: (Fraction(*bucket), bucket))


@given(SIDES, SIDES, st.sampled_from([16, 64]))
@settings(max_examples=200, deadline=None)
def test_nearest_is_nearest_in_log_space(width: int, height: int, step: int) -> None:
    table = bucket_table(1024**2, step, Fraction(4))
    chosen = nearest_bucket(width, height, table)

    def distance(bucket: tuple[int, int]) -> float:
        return abs(math.log(width / height) - math.log(bucket[0] / bucket[1]))

    assert chosen in table
    assert distance(chosen) <= min(map(distance, table)) + 1e-12
    assert nearest_bucket(height, width, table) in {chosen[::-1]} | {  # or a tie, which goes to the narrower
        bucket for bucket in table if math.isclose(distance(bucket[::-1]), distance(chosen), abs_tol=1e-12)
    }


@given(SIDES, SIDES, OPTIONS)
@example(264, 672, BucketOptions(areas=(512 * 512,), step=16, max_upscale=Fraction(3, 2)))  # 263.5 of 264 columns stay
@settings(max_examples=150, deadline=None)
def test_place(width: int, height: int, options: BucketOptions) -> None:
    placement = place(width, height, options)
    if placement is None:
        smallest = (64 if min(options.areas) > 64**2 else 16, 64 if min(options.areas) > 64**2 else 16)
        assert (
            upscale(width, height, smallest) > options.max_upscale
            or max(width, height) > options.max_aspect_ratio * min(width, height)
            or options.step > 16
        )
        return
    bucket = placement.width, placement.height
    assert all(side % options.step == 0 and side > 0 for side in bucket)
    assert placement.width * placement.height <= max(options.areas)
    assert upscale(width, height, bucket) <= options.max_upscale
    # The crop box lies within the image, touches two opposite sides, is centred, and has the bucket's ratio.
    assert placement.crop_left >= 0 and placement.crop_left + placement.crop_width <= width
    assert placement.crop_top >= 0 and placement.crop_top + placement.crop_height <= height
    assert placement.crop_width == width or placement.crop_height == height
    assert abs(2 * placement.crop_left + placement.crop_width - width) <= 1
    assert abs(2 * placement.crop_top + placement.crop_height - height) <= 1
    errors = []  # of the side that was cut; where rounding left both whole, either may be it
    if placement.crop_width == width:
        errors.append(Fraction(width * bucket[1], bucket[0]) - placement.crop_height)
    if placement.crop_height == height:
        errors.append(Fraction(height * bucket[0], bucket[1]) - placement.crop_width)
    assert min(map(abs, errors)) <= Fraction(1, 2) or 1 in (placement.crop_width, placement.crop_height)


@given(st.integers(1, 200), st.integers(1, 200))
def test_a_multiple_of_the_bucket_is_not_cropped(factor: int, side: int) -> None:
    assert cover_box(64 * factor, 48 * factor, (64, 48)) == (0, 0, 64 * factor, 48 * factor)


@pytest.mark.parametrize(
    ("size", "expected"),
    [
        ((1024, 1024), (1024, 1024)),
        ((4000, 3000), (1184, 880)),  # 4:3 = 1.333, 1184:880 = 1.345
        ((3000, 4000), (880, 1184)),
        ((1023, 1024), (960, 960)),  # one pixel too small for 1024: the next square below
        ((300, 300), (256, 256)),
        ((64, 64), (64, 64)),
        ((63, 63), None),
        ((8192, 512), None),  # 16:1 is nearest to 4:1, 2048x512, at the limit
    ],
)
def test_known_sizes(size: tuple[int, int], expected: tuple[int, int] | None) -> None:
    placement = place(*size, BucketOptions())
    if size == (8192, 512):
        assert placement is not None and (placement.width, placement.height) == (2048, 512)
    else:
        assert (placement and (placement.width, placement.height)) == expected


def test_several_areas_take_the_largest_that_is_filled() -> None:
    options = BucketOptions(areas=(512**2, 768**2, 1024**2))
    sizes = {side: place(side, side, options) for side in (2000, 1024, 1000, 768, 700, 400)}
    found = {side: placement and placement.width for side, placement in sizes.items()}
    assert found == {2000: 1024, 1024: 1024, 1000: 768, 768: 768, 700: 512, 400: 384}


def test_upscale_and_fixed_size() -> None:
    assert place(512, 512, BucketOptions(max_upscale=Fraction(2))).width == 1024  # type: ignore[union-attr]
    fixed = BucketOptions(fixed=(640, 480))
    placement = place(2000, 2000, fixed)
    assert placement and (placement.width, placement.height) == (640, 480)
    assert (placement.crop_left, placement.crop_top, placement.crop_width, placement.crop_height) == (
        0,
        250,
        2000,
        1500,
    )
    assert place(639, 4000, fixed) is None


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"fixed": (1000, 512)}, "--width 1000: must be a multiple of 16, for instance 1008"),
        ({"fixed": (512, 500)}, "--height 500: must be a multiple of 16, for instance 496"),
        ({"step": 24}, "--bucket_step 24"),
        ({"areas": (100,)}, "at least 16 x 16"),
        ({"max_upscale": Fraction(0)}, "--max_upscale 0"),
        ({"max_aspect_ratio": Fraction(1, 2)}, "--max_aspect_ratio 0.5"),
    ],
)
def test_refused(options: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        BucketOptions(**options)
