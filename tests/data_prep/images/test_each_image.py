"""Every image at all given resolutions: which sizes, their keys, restarts and edits, and all on one side of validation."""

from __future__ import annotations

import json
import os
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data_prep import check_shards, encode_shards, make_shards
from data_prep.images.buckets import BucketOptions, bucket_table, place, places, upscale
from data_prep.shard_format.shards import ShardReader, read_index, read_manifest
from tests.helpers.photos import encoded, opened, photo
from train.data.shard_dataset import ShardDataset

AREAS = (256 * 256, 128 * 128, 64 * 64)
SIDES = {"large": (300, 280), "middle": (180, 140), "small": (90, 80), "tiny": (60, 50)}


def pack(base: Path, out: Path, *flags: str) -> int:
    sizes = ["--resolutions", "64,128,256", "--num_workers", "0", "--resize", "pillow"]
    return make_shards.main(["--dataset_base_path", str(base), "--output_path", str(out), *sizes, *flags])


@pytest.fixture
def base(tmp_path: Path) -> Path:
    folder = tmp_path / "in"
    folder.mkdir()
    for number, (name, size) in enumerate(SIDES.items()):
        (folder / f"{name}.jpg").write_bytes(encoded(photo(*size, seed=number)))
        (folder / f"{name}.txt").write_text(name)
    return folder


@given(st.integers(16, 2000), st.integers(16, 2000), st.sampled_from([1, Fraction(3, 2)]), st.booleans())
@settings(max_examples=200, deadline=None)
def test_each_area_that_is_filled_once(width, height, most, stretch):
    how = {"max_upscale": Fraction(most), "stretch": stretch, "max_aspect_ratio": Fraction(200)}
    options = BucketOptions(AREAS, every_area=True, **how)
    found = places(width, height, options)
    alone = {}
    for area in AREAS:
        placement = place(width, height, BucketOptions((area,), **how))
        table = bucket_table(area, 16, Fraction(200))
        if placement is not None and (stretch or (placement.width, placement.height) in table):
            alone[area] = placement
    sizes = [(each.width, each.height) for _, each in found]
    assert len(set(sizes)) == len(sizes) and sizes == sorted(sizes, key=lambda s: -s[0] * s[1])
    for area, each in found:
        if area:
            assert each == alone[area] and upscale(width, height, (each.width, each.height)) <= most
    largest = place(width, height, BucketOptions(AREAS, **how))
    assert (found[0][1] if found else None) == largest, "the first is what --each_image largest takes"


def test_a_large_image_is_three_samples_and_a_small_one_one(base: Path, tmp_path: Path, capsys) -> None:
    out = tmp_path / "out"
    assert pack(base, out, "--each_image", "all") == 0
    said = capsys.readouterr().out
    assert "2  images are packed at several sizes, each a sample (--each_image all)" in said
    index, manifest = read_index(out), read_manifest(out)
    sizes: dict[str, list[int]] = {}
    reader = ShardReader(out)
    for row in range(len(index)):
        bucket = manifest.buckets[index.bucket[row]]
        pixels = opened(reader.read(index.shard[row], index.payload_offset[row], index.payload_size[row]))
        assert pixels.shape == (bucket.height, bucket.width, 3)
        sizes.setdefault(str(index.path[row]), []).append(bucket.width * bucket.height)
        record = json.loads(reader.read(index.shard[row], index.json_offset[row], index.json_size[row]))
        assert record["caption"] == str(index.path[row]).removesuffix(".jpg")
    assert {name: len(areas) for name, areas in sizes.items()} == {
        "large.jpg": 3, "middle.jpg": 2, "small.jpg": 1,
    }  # fmt: skip
    assert all(areas == sorted(areas, reverse=True) for areas in sizes.values())
    assert len(set(index.key.tolist())) == len(index) == 6 and manifest.options["each_image"] == "all"
    assert check_shards.main([str(out), "--report", str(tmp_path / "report.html")]) == 0
    assert "each_image" in (tmp_path / "report.html").read_text()
    assert pack(base, tmp_path / "other", "--each_image", "all", "--dry_run") == 0
    assert "images are packed at several sizes" in capsys.readouterr().out


def test_largest_is_what_it_was(base: Path, tmp_path: Path) -> None:
    assert pack(base, tmp_path / "a") == 0 and pack(base, tmp_path / "b", "--each_image", "largest") == 0
    first, second = read_manifest(tmp_path / "a"), read_manifest(tmp_path / "b")
    assert first == second and first.totals["samples"] == 3 and "each_image" not in first.options
    assert (tmp_path / "a" / "000000.tar").read_bytes() == (tmp_path / "b" / "000000.tar").read_bytes()


def test_it_goes_on_in_small_shards_and_notices_an_edit(base: Path, tmp_path: Path, capsys) -> None:
    """An image's sizes may stand in several shards; its edit is found in each of them."""
    out, flags = tmp_path / "out", ("--each_image", "all", "--samples_per_shard", "2")
    assert pack(base, out, *flags) == 0
    whole = {path.name: path.read_bytes() for path in out.glob("*.tar")}
    assert len(whole) == 3
    for name in ("000001.tar", "000002.tar"):
        (out / name).unlink()
    assert pack(base, out, *flags) == 0
    assert {path.name: path.read_bytes() for path in out.glob("*.tar")} == whole
    capsys.readouterr()
    data = bytearray((base / "middle.jpg").read_bytes())
    data[-30] ^= 1
    (base / "middle.jpg").write_bytes(bytes(data))
    assert pack(base, out, *flags) == 2
    assert (
        "inputs were edited after they had been packed" in (error := capsys.readouterr().err) and "middle.jpg" in error
    )
    (base / "middle.jpg").write_bytes(bytes(data[:-30]) + bytes([data[-30] ^ 1]) + bytes(data[-29:]))
    os.utime(base / "large.jpg")
    assert pack(base, out, *flags) == 0, "a new time alone is no edit"
    assert pack(base, out, "--samples_per_shard", "2") == 2
    assert "each_image 'all' -> None" in capsys.readouterr().err


def test_all_sizes_of_an_image_fall_on_one_side_of_validation(base: Path, tmp_path: Path, tiny_model: Path) -> None:
    for number in range(8):
        (base / f"{number}.jpg").write_bytes(encoded(photo(150, 130, seed=number)))
        (base / f"{number}.txt").write_text("a caption")
    out, there = tmp_path / "out", tmp_path / "encoded"
    assert pack(base, out, "--each_image", "all") == 0
    flags = ["--model", str(tiny_model), "--data", str(out), "--output_path", str(there), "--dtype", "float32"]
    assert encode_shards.main(flags) == 0
    for folder in (out, there):
        names = read_index(folder).path
        for count in range(1, 8):
            dataset = ShardDataset(folder, count)
            held, trained = ({names[i] for i in part} for part in (dataset.validation, dataset.training))
            assert len(dataset.validation) >= count and not held & trained
            assert len(dataset.validation) < count + 3, "three sizes are the most"
            subset = dataset.training_subset(3)
            assert len(subset) >= 3 and set(subset) <= set(dataset.training)
    assert np.array_equal(ShardDataset(out, 3).validation, ShardDataset(there, 3).validation)
    with pytest.raises(ValueError, match="leaves nothing to train on"):
        ShardDataset(out, 21)


def test_it_needs_several_resolutions(base: Path, tmp_path: Path, capsys) -> None:
    small = ["--dataset_base_path", str(base), "--output_path", str(tmp_path / "out"), "--each_image", "all"]
    assert make_shards.main(small) == 2
    assert (
        "--each_image all stores an image at several sizes: give them, as in --resolutions 512"
        in capsys.readouterr().err
    )
