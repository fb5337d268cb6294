"""Parquet files that hold the images, as the hub serves them: found, judged, packed; damage named."""

from __future__ import annotations

import hashlib
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from data_prep import make_shards
from data_prep.shard_format.shards import read_manifest
from data_prep.sources import parquet_images
from data_prep.sources.find_inputs import Sources
from data_prep.sources.found_input import ROW
from tests.helpers.photos import encoded, photo

FLAGS = ["--resize", "pillow", "--max_pixels", "4096"]


def hub_file(path: Path, count: int, image: str = "image", caption: str = "text", group: int = 4) -> list[bytes]:
    path.parent.mkdir(parents=True, exist_ok=True)
    data = [encoded(photo(80 + number, 70, seed=number)) for number in range(count)]
    kind = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
    images = pa.array([{"bytes": item, "path": f"{number}.jpg"} for number, item in enumerate(data)], type=kind)
    table = pa.table({image: images, caption: [f"caption {number}" for number in range(count)]})
    pq.write_table(table, path, row_group_size=group, compression="none")
    return data


def pack(base: Path, out: Path, *flags: str) -> int:
    return make_shards.main(["--dataset_base_path", str(base), "--output_path", str(out), *FLAGS, *flags])


def sources_of(out: Path) -> dict[str, tuple]:
    rows = pq.read_table(out / "000000.parquet").to_pylist()
    return {row["path"]: (row["status"], row["reason"], row["caption"], row["sha256"]) for row in rows}


@pytest.mark.parametrize("name", ["metadata.parquet", "data/train-00000-of-00001.parquet"])
def test_the_hub_s_files_are_packed(tmp_path: Path, name: str) -> None:
    base = tmp_path / "in"
    data = hub_file(base / name, 11)
    (base / "more").mkdir()
    (base / "more" / "x.jpg").write_bytes(data[0])
    (base / "more" / "x.txt").write_text("beside")
    assert pack(base, tmp_path / "0", "--num_workers", "0") == 0
    assert pack(base, tmp_path / "1", "--num_workers", "1") == 0
    found = sources_of(tmp_path / "0")
    assert found == sources_of(tmp_path / "1") and len(found) == 12
    for number, item in enumerate(data):
        expected = ("ok", "", f"caption {number}", hashlib.sha256(item).hexdigest())
        assert found[f"{name}/{number:06d}/{number}.jpg"] == expected


def test_columns_of_other_names_and_plain_binary(tmp_path: Path) -> None:
    hub_file(tmp_path / "a.parquet", 2, "photo", "Caption")
    table = pa.table({"jpg": [encoded(photo(80, 70))], "prompt": ["plain"]})
    pq.write_table(table, tmp_path / "b.parquet")
    pq.write_table(pa.table({"number": [1]}), tmp_path / "c.parquet")
    source = Sources(tmp_path)
    assert [(item.path, item.caption, item.kind) for item in source] == [
        ("a.parquet/000000/0.jpg", "caption 0", ROW),
        ("a.parquet/000001/1.jpg", "caption 1", ROW),
        ("b.parquet/000000", "plain", ROW),
    ]
    assert source.remarks.lines() == ["1 parquet files without images; first c.parquet"]
    assert [item.path for item in Sources(tmp_path, image_column="jpg")] == ["b.parquet/000000"]


def test_damage_is_named_and_the_rest_is_packed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    base = tmp_path / "in"
    hub_file(base / "good.parquet", 6)
    data = hub_file(base / "bad.parquet", 6, group=2)
    whole = (base / "bad.parquet").read_bytes()
    place = whole.index(data[2]) - 16  # within the page's header
    (base / "bad.parquet").write_bytes(whole[:place] + b"\xff" * 12 + whole[place + 12 :])
    (base / "cut.parquet").write_bytes(whole[:-100])
    kind = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
    rows = pa.array([{"bytes": None, "path": "x.jpg"}, {"bytes": b"<html>", "path": None}, None], type=kind)
    pq.write_table(pa.table({"image": rows, "text": ["a", "b", "c"]}), base / "odd.parquet")
    assert pack(base, tmp_path / "out", "--num_workers", "0", "--max_failed_ratio", "1") == 0
    found = sources_of(tmp_path / "out")
    reasons = {path: row[1] for path, row in found.items() if row[0] != "ok"}
    assert reasons["cut.parquet"] == "broken parquet"
    assert reasons["odd.parquet/000000/x.jpg"] == "empty file" and reasons["odd.parquet/000001"] == "not an image"
    assert {path for path in reasons if path.startswith("bad.parquet")} >= {"bad.parquet/000002/2.jpg"}
    assert sum(path.startswith("good.parquet") for path in found if path not in reasons) == 6
    assert read_manifest(tmp_path / "out").totals["inputs"] == 6 + 6 + 1 + 3


def test_rows_are_read_once_and_in_few_at_a_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data = hub_file(tmp_path / "a.parquet", 50, group=20)
    opened, read = [], parquet_images._RowReader.read
    monkeypatch.setattr(parquet_images._RowReader, "__init__", _counting(opened, parquet_images._RowReader.__init__))
    held = []
    monkeypatch.setattr(
        parquet_images._RowReader, "read", lambda self, row: (held.append(len(self._batch)), read(self, row))[1]
    )
    found = [item.data for item in parquet_images.with_bytes(bytes(tmp_path), Sources(tmp_path), None)]
    assert found == data and len(opened) == 1 and max(held) <= parquet_images.BATCH_ROWS


def _counting(calls: list, function):
    def counted(self, *arguments):
        calls.append(arguments)
        function(self, *arguments)

    return counted


def bad_text(first: bytes, second: bytes) -> pa.Array:
    """Strings that pyarrow takes unseen, as a writer of another language may have stored them."""
    ends = b"".join(end.to_bytes(4, "little") for end in (0, len(first), len(first + second)))
    return pa.Array.from_buffers(pa.string(), 2, [None, pa.py_buffer(ends), pa.py_buffer(first + second)])


def test_text_that_is_no_utf8_fails_its_own_row(tmp_path: Path) -> None:
    data = [encoded(photo(80, 70, seed=number)) for number in range(2)]
    images = pa.StructArray.from_arrays([pa.array(data), bad_text(b"a.jpg", b"\xff.jpg")], ["bytes", "path"])
    (tmp_path / "names").mkdir()
    (tmp_path / "texts").mkdir()
    pq.write_table(pa.table({"image": images, "text": ["one", "two"]}), tmp_path / "names/n.parquet")
    good = pa.StructArray.from_arrays([pa.array(data)], ["bytes"])
    pq.write_table(pa.table({"image": good, "text": bad_text(b"one", b"caf\xe9")}), tmp_path / "texts/t.parquet")
    named = [(item.path, item.caption, item.problem) for item in Sources(tmp_path / "names")]
    assert named == [("n.parquet/000000/a.jpg", "one", None), ("n.parquet/000001/\\xff.jpg", "two", None)]
    fine, bad = Sources(tmp_path / "texts")
    assert fine.caption == "one" and bad.problem is not None and bad.problem[0] == "caption not readable"
    listed = pa.table({"file_name": ["a.jpg", "b.jpg"], "text": bad_text(b"one", b"caf\xe9")})
    (tmp_path / "listed").mkdir()
    for name in ("a.jpg", "b.jpg"):
        (tmp_path / "listed" / name).write_bytes(data[0])
    pq.write_table(listed, tmp_path / "listed/metadata.parquet")
    fine, bad = Sources(tmp_path / "listed")
    assert fine.caption == "one" and bad.problem is not None and bad.problem[0] == "caption not readable"


def test_the_columns_are_named_where_none_holds_captions(tmp_path: Path) -> None:
    hub_file(tmp_path / "x.parquet", 1, caption="txt")
    (item,) = Sources(tmp_path)
    assert item.hint == "no column prompt, text, caption, captions, only image, txt: name it with --caption_column"
