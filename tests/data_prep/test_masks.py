"""Masks from every way of naming them to encoded shards: what is a mask and what a picture, what is missing, what checked."""

from __future__ import annotations

import csv
import io
import json
import shutil
import tarfile
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image
from safetensors.torch import load

from data_prep import check_shards, encode_shards, make_shards
from data_prep.images.stored_pixels import decode_mask, latent_mask, mask_share
from data_prep.shard_format import shards
from data_prep.shard_format.scan_tars import build_index
from data_prep.shard_format.shards import ShardReader, read_index, read_manifest
from tests.helpers.photos import encoded, photo

SIZE = (96, 64)
FLAGS = ["--max_pixels", "6144", "--num_workers", "0", "--resize", "pillow"]


def pack(base: Path, out: Path, *flags: str) -> int:
    return make_shards.main(["--dataset_base_path", str(base), "--output_path", str(out), *FLAGS, *flags])


def image(folder: Path, name: str, seed: int = 1, caption: str | None = "p", size: tuple[int, int] = SIZE) -> None:
    path = folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(encoded(photo(*size, seed=seed)))
    if caption is not None:
        path.with_name(path.name.rpartition(".")[0] + ".txt").write_text(caption)


def half(share: float = 0.5, size: tuple[int, int] = SIZE) -> Image.Image:
    """White on the left `share` of it."""
    mask = np.zeros(size[::-1], np.uint8)
    mask[:, : round(share * size[0])] = 255
    return Image.fromarray(mask)


def save(mask: Image.Image, folder: Path, name: str) -> None:
    path = folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    mask.save(path, "PNG")


def rows_of(out: Path) -> dict[str, dict[str, Any]]:
    return {row["path"]: row for path in sorted(out.glob("0*.parquet")) for row in pq.read_table(path).to_pylist()}


def shares(out: Path) -> dict[str, float]:
    """The mean of each sample's mask by its path, read from the shards; -1 without one; all must agree."""
    index, reader, manifest = read_index(out), ShardReader(out), read_manifest(out)
    found = {}
    for row in range(len(index)):
        found[str(index.path[row])] = -1.0
        if index.mask_size[row]:
            bucket = manifest.buckets[index.bucket[row]]
            data = reader.read(int(index.shard[row]), int(index.mask_offset[row]), int(index.mask_size[row]))
            mask = latent_mask(decode_mask(data, bucket.width, bucket.height))
            found[str(index.path[row])] = mask_share(mask)
        assert found[str(index.path[row])] == pytest.approx(index.mask_share[row], abs=1e-6)
    assert check_shards.main([str(out), "--num_workers", "0"]) == 0
    return found


# ── what is a mask ───────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    "name",
    ["x-masklabel.png", "x.mask.png", "x.mask.PNG", "x-MaskLabel.Png", "x.mask.webp", "x-masklabel.jpg", "x.Mask.bmp"],
)
def test_a_mask_beside_its_image(tmp_path: Path, name: str) -> None:
    base, out = tmp_path / "in", tmp_path / "out"
    image(base, "x.JPG")
    save(half(0.25), base, name)
    assert pack(base, out) == 0
    assert shares(out) == {"x.JPG": 0.25}
    totals = read_manifest(out).totals
    assert totals["masked"] == totals["samples"] == totals["inputs"] == 1
    record = json.loads(member(out, "json"))
    assert record["mask"]["path"] == name and len(record["mask"]["sha256"]) == 64
    with tarfile.open(out / "000000.tar") as tar:
        assert [each.partition(".")[2] for each in tar.getnames()] == ["jpg", "json", "txt", "mask.png"]


def member(out: Path, name: str) -> bytes:
    index = read_index(out)
    place = (int(getattr(index, f"{name}_{field}")[0]) for field in ("offset", "size"))
    return ShardReader(out).read(0, *place)


def test_off_packs_them_as_pictures(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    base = tmp_path / "in"
    image(base, "x.jpg")
    save(half(), base, "x.mask.png")
    assert pack(base, tmp_path / "out", "--masks", "off", "--on_missing_caption", "empty") == 0
    assert shares(tmp_path / "out") == {"x.jpg": -1, "x.mask.png": -1}
    for flags in (["--mask_folder", str(base)], ["--mask_from_alpha"], ["--on_missing_mask", "skip"]):
        assert pack(base, tmp_path / "other", "--masks", "off", *flags) == 2
        assert f"--masks off and {flags[0]} contradict each other" in capsys.readouterr().err


def test_names_like_masks_without_an_image(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A photo that really has such a name has a caption of its own; other such files are left out and told."""
    base, out = tmp_path / "in", tmp_path / "out"
    image(base, "cat.jpg")
    image(base, "x-masklabel.png", caption="a photo of a label")
    image(base, "X.jpg")  # another stem than x
    save(half(), base, "lost.mask.png")
    save(half(), base, "x.mask.png")
    assert pack(base, out, "--on_missing_caption", "empty") == 0
    assert shares(out) == {"X.jpg": -1, "cat.jpg": -1, "x-masklabel.png": -1}
    said = capsys.readouterr().out
    assert "2 pictures are named like masks but belong to no image, and are left out" in said
    assert "first lost.mask.png" in said and "have a mask" not in said


def test_several_masks_of_one_image(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    base, out = tmp_path / "in", tmp_path / "out"
    image(base, "x.jpg")
    save(half(0.25), base, "x.mask.png")
    save(half(0.75), base, "x-masklabel.png")
    assert pack(base, out) == 0
    assert shares(out) == {"x.jpg": 0.25} and "first x-masklabel.png" in capsys.readouterr().out


def test_a_folder_of_masks(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Equal stems and subfolders, in any format, within the images' folder or outside; masks that nothing took are told."""
    for place in ("in/masks", "elsewhere"):
        base, folder, out = tmp_path / "in", tmp_path / place, tmp_path / f"out-{Path(place).name}"
        shutil.rmtree(base, ignore_errors=True)
        image(base, "a.jpg")
        image(base, "sub/b.jpg")
        image(base, "c.jpg")
        save(half(0.25), folder, "a.png")
        save(half(0.5), folder, "sub/b.PNG")
        save(half(0.5), folder, "d.png")
        save(half(0.75), base, "c.mask.png")  # beside the image, where the folder has none
        assert pack(base, out, "--mask_folder", str(folder), "--on_missing_caption", "empty") == 0
        assert shares(out) == {"a.jpg": 0.25, "sub/b.jpg": 0.5, "c.jpg": 0.75}
        said = capsys.readouterr().out
        assert "1 pictures are named like masks" in said and "d.png" in said
    assert pack(base, tmp_path / "no", "--mask_folder", str(tmp_path / "missing")) == 2
    assert pack(base, tmp_path / "no", "--mask_folder", str(base)) == 2
    said = capsys.readouterr().err
    assert "missing: no such folder" in said and "holds the images" in said


@pytest.mark.parametrize("column", ["mask", "Mask_Path", "region"])
def test_a_column_of_metadata(tmp_path: Path, column: str, capsys: pytest.CaptureFixture[str]) -> None:
    base, out = tmp_path / "in", tmp_path / "out"
    for name in ("a.jpg", "b.jpg", "c.jpg"):
        image(base, name, caption=None)
    save(half(0.25), base, "m/1.png")
    save(half(0.5), base, "b.mask.png")
    rows = [("a.jpg", "m/1.png"), ("b.jpg", ""), ("c.jpg", "m/gone.png")]
    with open(base / "metadata.csv", "w", newline="") as file:
        csv.writer(file).writerows([("image", "prompt", column), *((name, "p", mask) for name, mask in rows)])
    flags = ["--mask_column", "region"] if column == "region" else []
    assert pack(base, out, *flags) == 0
    assert shares(out) == {"a.jpg": 0.25, "b.jpg": 0.5}
    said = capsys.readouterr().out
    assert rows_of(out)["c.jpg"]["reason"] == "mask missing" and "gone.png" in rows_of(out)["c.jpg"]["detail"]
    assert "not in it, and left out" not in said, "masks are no unlisted pictures"
    assert pack(base, tmp_path / "none", "--mask_column", "none") == 0
    assert pack(base, tmp_path / "typo", "--mask_column", "maks") == 2
    assert "has no column maks (--mask_column)" in capsys.readouterr().err


def test_a_column_that_holds_no_paths(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Polygons under a name that nobody gave are something else's; under one that was given they fail by name."""
    base = tmp_path / "in"
    image(base, "a.jpg", caption=None)
    (base / "metadata.jsonl").write_text(json.dumps({"image": "a.jpg", "prompt": "p", "mask": [[1, 2], [3, 4]]}))
    assert pack(base, tmp_path / "out") == 0
    assert "column of masks that holds no paths" in capsys.readouterr().out
    assert pack(base, tmp_path / "named", "--mask_column", "mask") == 2
    assert "mask not usable" in capsys.readouterr().err


def test_masks_in_tars(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """By their names too; names that come twice have the masks of their turns; our own shards keep theirs."""
    base, out = tmp_path / "in", tmp_path / "out"
    base.mkdir()
    one, mask_of = encoded(photo(*SIZE, seed=1)), {}
    for share in (0.25, 0.5, 0.75):
        file = io.BytesIO()
        half(share).save(file, "PNG")
        mask_of[share] = file.getvalue()
    members = [("x.jpg", one), ("x.txt", b"p"), ("x.mask.png", mask_of[0.25])]
    members += [("x.jpg", one), ("x.txt", b"q"), ("x.mask.png", mask_of[0.5])]
    members += [("d/y-masklabel.PNG", mask_of[0.75]), ("d/y.jpg", one), ("d/y.txt", b"p"), ("z.mask.png", mask_of[0.5])]
    with tarfile.open(base / "s.tar", "w") as tar:
        for name, data in members:
            header = tarfile.TarInfo(name)
            header.size = len(data)
            tar.addfile(header, io.BytesIO(data))
    assert pack(base, out, "--on_missing_caption", "empty") == 0
    index = read_index(out)
    assert np.sort(index.mask_share).tolist() == [0.25, 0.5, 0.75]
    assert dict(zip(index.path, index.mask_share, strict=True))["s.tar/d/y.jpg"] == 0.75
    assert "first s.tar/z.mask.png" in capsys.readouterr().out
    again = tmp_path / "again"
    assert pack(out, again) == 0
    assert np.sort(list(shares(again).values())).tolist() == [0.25, 0.5, 0.75]


def test_masks_in_parquet_are_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "in").mkdir()
    data = encoded(photo(*SIZE))
    table = pa.table({"image": [{"bytes": data, "path": "a.jpg"}], "text": ["p"], "mask": [{"bytes": data}]})
    pq.write_table(table, tmp_path / "in" / "train.parquet")
    assert pack(tmp_path / "in", tmp_path / "out") == 0
    assert "column of masks that holds no paths, which is not read" in capsys.readouterr().out


def test_the_alpha_channel(tmp_path: Path) -> None:
    """The mask of images that have one and no mask file; the pictures are those without the option."""
    base = tmp_path / "in"
    for name in ("a.png", "b.png"):
        image(base, name, seed=ord(name[0]))
        with Image.open(base / name) as picture:
            picture = picture.convert("RGBA")
        picture.putalpha(half(0.25))
        picture.save(base / name)
    image(base, "c.jpg")
    save(half(0.75), base, "b.mask.png")
    assert pack(base, tmp_path / "out", "--mask_from_alpha") == 0
    assert shares(tmp_path / "out") == {"a.png": 0.25, "b.png": 0.75, "c.jpg": -1}
    assert pack(base, tmp_path / "plain") == 0
    assert member(tmp_path / "out", "payload") == member(tmp_path / "plain", "payload")
    options = read_manifest(tmp_path / "plain").options
    assert "mask_from_alpha" not in options and read_manifest(tmp_path / "out").options["mask_from_alpha"] is True


# ── what is missing or wrong ─────────────────────────────────────────────────────────────────────────────────────────


def test_images_without_a_mask(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    base = tmp_path / "in"
    image(base, "a.jpg")
    image(base, "b.jpg")
    save(half(), base, "a.mask.png")
    assert pack(base, tmp_path / "whole") == 0
    assert "1  have none: all of the image counts (--on_missing_mask)" in capsys.readouterr().out
    assert pack(base, tmp_path / "skip", "--on_missing_mask", "skip") == 0
    assert shares(tmp_path / "skip") == {"a.jpg": 0.5}
    assert rows_of(tmp_path / "skip")["b.jpg"]["reason"] == "no mask"
    assert pack(base, tmp_path / "error", "--on_missing_mask", "error") == 2
    assert "b.jpg has no mask" in capsys.readouterr().err


def test_bad_masks_fail_by_name(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    base, out = tmp_path / "in", tmp_path / "out"
    for number in range(8):
        image(base, f"{number}.jpg", seed=number)
    save(half(size=(64, 96)), base, "0.mask.png")  # turned, and nothing says so
    (base / "1.mask.png").write_bytes(b"no picture")
    save(half(), base, "2.mask.png")
    (base / "2.mask.png").write_bytes((base / "2.mask.png").read_bytes()[:-60])
    save(half(0), base, "3.mask.png")
    (base / "4.mask.heic").write_bytes(b"\0\0\0\x18ftypheic")
    (base / "5.mask.png").symlink_to("/etc/hostname")
    assert pack(base, out, "--max_failed_ratio", "1") == 0
    rows = rows_of(out)
    for number, says in {
        0: "0.mask.png: of another shape than its image: 64x96, its image 96x64",
        1: "1.mask.png: not an image",
        2: "2.mask.png: truncated image",
        4: "4.mask.heic: no reader for this format",
        5: "5.mask.png: outside of the folder",
    }.items():
        row = rows[f"{number}.jpg"]
        assert row["status"] == "failed" and row["reason"] == "mask not usable", number
        assert row["detail"].startswith(says), number
    assert shares(out) == {"3.jpg": 0, "6.jpg": -1, "7.jpg": -1}
    assert "1  warning: masks are black where the image was kept" in capsys.readouterr().out
    assert read_manifest(out).totals["black_masks"] == 1


def test_an_edited_mask_is_noticed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """As an edited image is: a run that goes on refuses it, also where its size stayed."""
    base, out = tmp_path / "in", tmp_path / "out"
    image(base, "a.jpg")
    half(0.25).save(base / "a.mask.bmp")
    assert pack(base, out) == 0 and pack(base, out) == 0
    half(0.5).save(base / "a.mask.bmp")
    assert pack(base, out) == 2
    assert "1 inputs were edited after they had been packed" in capsys.readouterr().err
    (base / "a.mask.bmp").unlink()
    assert pack(base, out) == 2
    assert "1 inputs changed, first a.jpg" in capsys.readouterr().err


def test_sets_without_masks_are_as_before(tmp_path: Path) -> None:
    image(tmp_path / "in", "a.jpg")
    assert pack(tmp_path / "in", tmp_path / "out") == 0
    manifest = (tmp_path / "out" / "manifest.json").read_text()
    assert "mask" not in manifest and "mask" not in (tmp_path / "out" / "000000_stats.json").read_text()
    for name in ("index.parquet", "000000.parquet"):
        assert not [column for column in pq.read_schema(tmp_path / "out" / name).names if "mask" in column]
    assert b"mask" not in member(tmp_path / "out", "json")


def test_a_dry_run_tells(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    image(tmp_path / "in", "a.jpg")
    image(tmp_path / "in", "b.jpg", seed=2)
    save(half(), tmp_path / "in", "a.mask.png")
    assert pack(tmp_path / "in", tmp_path / "out", "--dry_run", "--remove_duplicates", "exact") == 0
    assert "1  samples have a mask (--masks off packs files of such names as pictures); 1 have none" in (
        capsys.readouterr().out
    )


# ── pairs, scans, checks, encoding ───────────────────────────────────────────────────────────────────────────────────


def test_of_a_pair_the_mask_is_the_targets(tmp_path: Path) -> None:
    base, out = tmp_path / "in", tmp_path / "out"
    image(base, "target/t.jpg", 1)
    image(base, "source/t.jpg", 2, caption=None)
    save(half(0.25), base, "target/t.mask.png")
    assert pack(base, out, "--source_pixels", "9216") == 0
    assert shares(out) == {"target/t.jpg": 0.25}
    with tarfile.open(out / "000000.tar") as tar:
        names = [each.partition(".")[2] for each in tar.getnames()]
    assert names == ["jpg", "json", "txt", "mask.png", "source_image.jpg"]
    assert read_manifest(out).totals["pairs"] == 1


@pytest.fixture(scope="module")
def masked(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Shards of three samples, the first two with masks."""
    base, out = tmp_path_factory.mktemp("photos"), tmp_path_factory.mktemp("shards") / "out"
    for number in range(3):
        image(base, f"{number}.jpg", seed=number)
    for number in range(2):
        save(half((number + 1) / 4), base, f"{number}.mask.png")
    assert pack(base, out) == 0
    return out


def test_plain_shards_with_masks_are_indexed(masked: Path, tmp_path: Path) -> None:
    """Without manifest and index: found again by scanning; a member of that name that is none of ours is left alone."""
    folder = tmp_path / "plain"
    folder.mkdir()
    shutil.copy(masked / "000000.tar", folder)
    manifest = build_index(folder)
    assert manifest.totals["masked"] == 2 and list(shares(folder).values()) == [0.25, 0.5, -1]
    with tarfile.open(tmp_path / "other.tar", "w") as tar:
        for name, data in (("a.jpg", encoded(photo(*SIZE))), ("a.mask.png", encoded(photo(*SIZE)))):
            header = tarfile.TarInfo(name)
            header.size = len(data)
            tar.addfile(header, io.BytesIO(data))
    other = tmp_path / "other"
    other.mkdir()
    shutil.move(tmp_path / "other.tar", other)
    assert "masked" not in build_index(other).totals and check_shards.main([str(other), "--num_workers", "0"]) == 0


@pytest.mark.parametrize(
    ("column", "value", "says"),
    [
        ("mask_share", 0.3, "the mask's mean is 0.250000, the index says 0.300000"),
        ("mask_share", -1.0, "has 1 masks, the index says a share of -1"),
        ("mask_size", 7, "mask is at"),
        ("mask_offset", 512, "mask is at"),
    ],
)
def test_checking_finds_what_doesnt_agree(
    masked: Path, tmp_path: Path, column: str, value: float, says: str, capsys: pytest.CaptureFixture[str]
) -> None:
    out = shutil.copytree(masked, tmp_path / "set")
    table = pq.read_table(out / shards.INDEX).to_pydict()
    table[column][0] = value
    shards.write_index(out, table)
    assert check_shards.main([str(out), "--num_workers", "0"]) == 1
    said = capsys.readouterr().err
    assert says in said and f"{column} is " in said


def test_the_report_shows_masks(masked: Path, tmp_path: Path) -> None:
    report = tmp_path / "report.html"
    assert check_shards.main([str(masked), "--num_workers", "0", "--report", str(report)]) == 0
    page = report.read_text()
    assert "<b>2</b><span>with masks</span>" in page and "Striped: what a mask leaves out" in page
    assert "mask 25 %" in page and page.count("mask 50 %") == 1


def test_encoding_keeps_masks_on_the_latent_grid(
    masked: Path, tiny_model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "encoded"
    flags = ["--model", str(tiny_model), "--data", str(masked), "--output_path", str(out), "--dtype", "float32"]
    assert encode_shards.main(flags) == 0
    assert "2 samples have a mask" in capsys.readouterr().out
    images, index = read_index(masked), read_index(out)
    assert index.mask_share.tolist() == images.mask_share.tolist() and read_manifest(out).totals["masked"] == 2
    for row in range(3):
        place = int(index.payload_offset[row]), int(index.payload_size[row])
        tensors = load(ShardReader(out).read(0, *place))
        assert ("mask" in tensors) == (row < 2)
        if row < 2:
            data = ShardReader(masked).read(0, int(images.mask_offset[row]), int(images.mask_size[row]))
            assert torch.equal(tensors["mask"], torch.from_numpy(latent_mask(decode_mask(data, *SIZE))))
    assert check_shards.main([str(out), "--num_workers", "0"]) == 0
    table = pq.read_table(out / shards.INDEX).to_pydict()
    table["mask_share"][:2] = [-1.0, 0.9]
    shards.write_index(out, table)
    capsys.readouterr()
    assert check_shards.main([str(out), "--num_workers", "0"]) == 1
    said = capsys.readouterr().err
    assert "has a mask, the index says none" in said and "the mask's mean is 0.500000" in said


def test_at_every_size_and_with_weights(tmp_path: Path) -> None:
    """An image that is stored at several sizes has its mask at each; in a kohya folder it counts as often."""
    base, out = tmp_path / "in", tmp_path / "out"
    image(base, "3_ball/x.jpg", size=(256, 256))
    save(half(0.25, (256, 256)), base, "3_ball/x.mask.png")
    flags = ["--dataset_base_path", str(base), "--output_path", str(out), "--num_workers", "0", "--resize", "pillow"]
    assert make_shards.main([*flags, "--resolutions", "64,128", "--each_image", "all"]) == 0
    index = read_index(out)
    assert index.mask_share.tolist() == [0.25, 0.25] and index.weight.tolist() == [3, 3]
    assert check_shards.main([str(out), "--num_workers", "0"]) == 0
    assert read_manifest(out).totals["masked"] == 2
