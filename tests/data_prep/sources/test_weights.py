"""Weights of images: kohya's folders, columns of metadata, keys in tars, and their way into shards."""

from __future__ import annotations

import io
import json
import tarfile
from decimal import Decimal
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from data_prep import check_shards, encode_shards, make_shards
from data_prep.packing.plan import plan_file
from data_prep.shard_format.shards import INDEX, ShardReader, check_index, read_index, read_manifest
from data_prep.sources import remarks, weights
from data_prep.sources.find_inputs import Sources
from tests.helpers.photos import encoded, photo

JPEG = encoded(photo(80, 64))


def put(root: Path, files: dict[str, bytes | str]) -> Path:
    for name, content in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return root


def found(source: Sources) -> dict[str, float | str]:
    """path -> weight, or what is wrong."""
    return {item.path: ": ".join(item.problem) if item.problem else item.weight for item in source}


def captioned(*names: str) -> dict[str, bytes | str]:
    return {f"{name}.jpg": JPEG for name in names} | {f"{name}.txt": "a caption" for name in names}


def pack(base: Path, out: Path, *flags: str) -> int:
    small = ["--max_pixels", "4096", "--num_workers", "0", "--resize", "pillow"]
    return make_shards.main(["--dataset_base_path", str(base), "--output_path", str(out), *small, *flags])


@pytest.mark.parametrize(
    "cell, weight",
    [
        (None, 1),
        ("", 1),
        (" ", 1),
        (2, 2),
        ("2.5", 2.5),
        (0, 0),
        ("-0.0", 0),
        (0.001, 0.001),
        (1000, 1000),
        ("1e1", 10),
        (Decimal("2.5"), 2.5),
    ],
)
def test_what_a_weight_may_be(cell, weight):
    assert weights.from_cell(cell, "weight") == weight


@pytest.mark.parametrize(
    "cell", [-1, "-0.5", "nan", float("nan"), float("inf"), "two", True, [2], {}, 1001, 1e-9, 10**400]
)
def test_what_is_no_weight(cell):
    with pytest.raises(ValueError, match=r"repeats is .*, not a number from 0.001 to 1000, or 0 to leave it out"):
        weights.from_cell(cell, "repeats")


@pytest.mark.parametrize(
    "name, repeats",
    [("10_cat", 10), ("1_reg", 1), ("0_off", 0), ("999_x y_z", 999), ("1000_x", 1000)]
    + [(name, None) for name in ("2024_summer", "01_intro", "cat", "10", "10_", "_x", "10cat", "-3_x", "1.5_x", "٣_x")],
)
def test_kohya_s_folders_are_told_from_names(name, repeats):
    assert weights.of_folder(name) == repeats


def test_images_of_kohya_s_folders_come_so_often(tmp_path: Path) -> None:
    base = put(
        tmp_path / "in",
        captioned("10_cat/a", "10_cat/below/b", "10_cat/2_more/c", "1_d/d", "0_e/e", "2024_f/f", "g")
        | {"3_t/metadata.jsonl": '{"file_name": "x.jpg", "text": "x", "weight": 0.5}', "3_t/x.jpg": JPEG},
    )
    source = Sources(base)
    assert found(source) == {
        "g.jpg": 1, "0_e/e.jpg": 0, "10_cat/a.jpg": 10, "10_cat/below/b.jpg": 10, "10_cat/2_more/c.jpg": 2, "1_d/d.jpg": 1,
        "2024_f/f.jpg": 1, "3_t/x.jpg": 1.5,
    }  # fmt: skip
    counts = source.remarks.counts
    assert (counts[remarks.REPEATS], counts[remarks.NUMBERED], counts[remarks.WEIGHTS]) == (5, 1, 1)
    assert set(found(Sources(base, kohya_folders=False)).values()) == {1, 0.5}


@pytest.mark.parametrize("column", ["weight", "Num_Repeats", "repeats"])
def test_a_column_of_metadata_is_found_by_name(tmp_path: Path, column: str) -> None:
    base = put(tmp_path, dict.fromkeys(("a.jpg", "b.jpg", "c.jpg", "d.jpg", "e.jpg"), JPEG))
    rows = ["a.jpg,a,2.5", "b.jpg,b,", "c.jpg,c,0", "d.jpg,d,-1", "e.jpg,e,often"]
    (base / "metadata.csv").write_text("\n".join([f"file_name,text,{column}", *rows]))
    name = f"metadata.csv line {{}}: {column} is"
    wrong = "not a number from 0.001 to 1000, or 0 to leave it out"
    assert found(Sources(base)) == {
        "a.jpg": 2.5, "b.jpg": 1, "c.jpg": 0, "d.jpg": f"weight not usable: {name.format(5)} '-1', {wrong}",
        "e.jpg": f"weight not usable: {name.format(6)} 'often', {wrong}",
    }  # fmt: skip
    assert set(found(Sources(base, weight_column="none")).values()) == {1}


def test_lists_of_objects_and_a_named_column(tmp_path: Path) -> None:
    """musubi-tuner's jsonl, where not every line has the key; another column by its name; one that isn't there."""
    base = put(tmp_path, dict.fromkeys(("a.jpg", "b.jpg", "c.jpg"), JPEG))
    lines = [
        {"image_path": "a.jpg", "caption": "a", "num_repeats": 3, "often": 7},
        {"image_path": "b.jpg", "caption": "b"},
        {"image_path": "c.jpg", "caption": "c", "weight": float("nan")},
    ]
    (base / "metadata.jsonl").write_text("\n".join(map(json.dumps, lines)))
    seen = found(Sources(base))
    assert (seen["a.jpg"], seen["b.jpg"]) == (3, 1)
    assert seen["c.jpg"].startswith("weight not usable: metadata.jsonl line 3: weight is nan")
    assert found(Sources(base, weight_column="Often")) == {"a.jpg": 7, "b.jpg": 1, "c.jpg": 1}
    with pytest.raises(
        ValueError, match=r"has no column share \(--weight_column\), only image_path, caption, num_repeats"
    ):
        list(Sources(base, weight_column="share"))


def test_tars_and_parquet_of_images(tmp_path: Path) -> None:
    with tarfile.open(tmp_path / "a.tar", "w") as tar:
        members = {"x.jpg": JPEG, "x.txt": b"x", "x.json": b'{"weight": 4}', "y.jpg": JPEG, "y.json": b'{"text": "y"}'}
        members |= {
            "z.jpg": JPEG,
            "z.json": b'{"text": "z", "repeats": "many"}',
            "w.jpg": JPEG,
            "w.txt": b"w",
            "w.json": b"{",
        }
        for name, data in members.items():
            header = tarfile.TarInfo(name)
            header.size = len(data)
            tar.addfile(header, io.BytesIO(data))
    table = pa.table({"jpg": [JPEG, JPEG], "text": ["p", "q"], "weight": [0.25, None]})
    pq.write_table(table, tmp_path / "p.parquet")
    seen = found(Sources(tmp_path))
    assert seen.pop("a.tar/z.jpg").startswith("weight not usable: a.tar/z.jpg: repeats is 'many'")
    assert seen == {
        "a.tar/x.jpg": 4,
        "a.tar/y.jpg": 1,
        "a.tar/w.jpg": 1,
        "p.parquet/000000": 0.25,
        "p.parquet/000001": 1,
    }
    assert set(found(Sources(tmp_path, weight_column="none")).values()) == {1}


def test_a_regularization_folder_is_no_part_of_the_training_set(tmp_path: Path) -> None:
    files = captioned("img/10_zwx cat/a", "reg/1_cat/b", "reg/1_cat/c", "img/reg/d", "1_x/e", "Regularization/f")
    base = put(tmp_path / "in", files)
    source = Sources(base)
    assert set(found(source)) == {"img/10_zwx cat/a.jpg", "1_x/e.jpg"}
    lines = [line for line in source.remarks.lines() if "regularization" in line]
    assert any(line.startswith("2 images lie in kohya's regularization folder reg and are left out") for line in lines)
    assert (
        any("--dataset_base_path …/img/reg) and train with it as --prior_data" in line for line in lines)
        and len(lines) == 3
    )
    assert len(found(Sources(base, kohya_folders=False))) == 6
    assert found(Sources(base / "reg")) == {"1_cat/b.jpg": 1, "1_cat/c.jpg": 1}, "by itself it is a set as any other"
    plain = put(tmp_path / "plain", captioned("reg/a", "cats/b"))
    assert len(found(Sources(plain))) == 2, "nothing else says that this is kohya's layout"


# ── into shards ──────────────────────────────────────────────────────────────────────────────────────────────────────


def test_weights_reach_index_json_and_encoded_shards(tmp_path: Path, tiny_model: Path, capsys) -> None:
    base = put(tmp_path / "in", captioned("10_cat/a", "10_cat/b", "0_off/c", "d"))
    out = tmp_path / "shards"
    assert pack(base, out, "--samples_per_shard", "2") == 0
    said = capsys.readouterr().out
    assert "3 images lie in kohya's repeat folders (10_name) and come so many times an epoch" in said
    assert "1  filtered: weight 0; first 0_off/c.jpg" in said
    index, manifest = read_index(out), read_manifest(out)
    by_path = dict(zip(index.path.tolist(), index.weight.tolist(), strict=True))
    assert by_path == {"10_cat/a.jpg": 10, "10_cat/b.jpg": 10, "d.jpg": 1} and manifest.totals["weighted"] == 2
    reader = ShardReader(out)
    for row in range(3):
        record = json.loads(reader.read(index.shard[row], index.json_offset[row], index.json_size[row]))
        assert record.get("weight", 1) == index.weight[row] and ("weight" in record) == (index.weight[row] != 1)
    page = tmp_path / "report.html"
    assert check_shards.main([str(out), "--report", str(page)]) == 0
    assert "Images × weight, by folder" in (text := page.read_text()) and "2 × 10 = 20 an epoch" in text
    encoded_set = tmp_path / "encoded"
    flags = ["--model", str(tiny_model), "--data", str(out), "--output_path", str(encoded_set), "--dtype", "float32"]
    assert encode_shards.main(flags) == 0
    assert (
        read_index(encoded_set).weight.tolist() == index.weight.tolist() and check_shards.main([str(encoded_set)]) == 0
    )
    assert pack(base, out) == 2, "another number of samples a shard"
    assert pack(base, out, "--samples_per_shard", "2") == 0, "goes on, and finds all there"


def test_without_weights_nothing_is_written_of_them(tmp_path: Path) -> None:
    base = put(tmp_path / "in", captioned("1_cat/a", "b"))
    (base / "m").mkdir()
    put(base / "m", {"metadata.csv": "file_name,text,weight\nx.jpg,x,1\n", "x.jpg": JPEG})
    assert pack(base, tmp_path / "out") == 0 and pack(base, tmp_path / "off", "--kohya_folders", "off") == 0
    for name in (INDEX, "000000.parquet"):
        assert "weight" not in pq.read_schema(tmp_path / "out" / name).names
    assert "weighted" not in read_manifest(tmp_path / "out").totals
    assert (tmp_path / "out" / "000000.tar").read_bytes() == (tmp_path / "off" / "000000.tar").read_bytes()
    assert read_manifest(tmp_path / "out").fingerprint == read_manifest(tmp_path / "off").fingerprint
    assert read_index(tmp_path / "out").weight.tolist() == [1, 1, 1]


def test_another_weight_is_another_set(tmp_path: Path, capsys) -> None:
    base = put(tmp_path / "in", captioned("2_cat/a", "b"))
    assert pack(base, tmp_path / "out") == 0
    assert pack(base, tmp_path / "out", "--kohya_folders", "off") == 2
    assert "1 inputs changed, first 2_cat/a.jpg" in capsys.readouterr().err
    assert plan_file(tmp_path / "out").is_file()


def test_a_damaged_weight_is_refused(tmp_path: Path, capsys) -> None:
    base = put(tmp_path / "in", captioned("2_cat/a", "b"))
    out = tmp_path / "out"
    assert pack(base, out) == 0
    table = pq.read_table(out / INDEX)
    for wrong in (0.0, -2.0, float("nan"), 1e9, float("inf")):
        place = table.schema.get_field_index("weight")
        pq.write_table(table.set_column(place, "weight", pa.array([wrong, 1.0])), out / INDEX)
        with pytest.raises(ValueError, match="is damaged: row 0 has weight"):
            check_index(read_index(out), read_manifest(out), out)
    pq.write_table(table.set_column(place, "weight", pa.array(np.array([3.0, 1.0]))), out / INDEX)
    capsys.readouterr()
    assert check_shards.main([str(out)]) != 0
    assert "weight is" in capsys.readouterr().err
