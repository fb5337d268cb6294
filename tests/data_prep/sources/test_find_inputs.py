"""Sources: caption files, metadata files, tars, names, links and paths that lead out."""

from __future__ import annotations

import io
import json
import os
import re
import tarfile
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from data_prep.sources.find_inputs import Sources
from data_prep.sources.found_input import Input
from data_prep.sources.remarks import SAME_STEM
from tests.helpers.photos import encoded, folder_of, photo

JPEG = encoded(photo(32, 32))


def captions_of(inputs: Sources) -> dict[str, str | None]:
    return {item.path: item.caption for item in inputs}


def test_caption_files_and_names(tmp_path: Path) -> None:
    base = folder_of(
        tmp_path,
        {
            "b/photo v1.2.jpg": JPEG,
            "b/photo v1.2.txt": "first",
            "b/photo v1.3.JPG": JPEG,
            "b/photo v1.3.caption": "second",
            "a/Käfer 🐞.png": JPEG,
            "a/Käfer 🐞.TXT": "bug",
            "A.jpg": JPEG,
            "a.txt": "not for A",
            "z.webp": JPEG,
            ".hidden.jpg": JPEG,
            ".cache/x.jpg": JPEG,
            "notes.md": "",
        },
    )
    source = Sources(base)
    assert captions_of(source) == {
        "A.jpg": None,
        "z.webp": None,
        "a/Käfer 🐞.png": "bug",
        "b/photo v1.2.jpg": "first",
        "b/photo v1.3.JPG": "second",
    }
    assert list(captions_of(source)) == ["A.jpg", "z.webp", "a/Käfer 🐞.png", "b/photo v1.2.jpg", "b/photo v1.3.JPG"]
    assert source.ignored == {".md": 1} and source.files_seen == 10


def test_a_name_that_is_no_unicode(tmp_path: Path) -> None:
    name = os.path.join(os.fsencode(tmp_path), b"caf\xe9.jpg")
    with open(name, "wb") as file:
        file.write(JPEG)
    (item,) = Sources(tmp_path)
    assert item.path == "caf\\xe9.jpg" and item.file == b"caf\xe9.jpg" and item.size == len(JPEG)


ROWS = [("sub/1.jpg", "None"), ("2.jpg", "12"), ("3.jpg", "NA")]


def metadata(kind: str, image: str, caption: str) -> bytes:
    rows = [{image: path, caption: text} for path, text in ROWS]
    if kind == "csv":
        return "\n".join([f"{image},{caption}", *(f"{path},{text}" for path, text in ROWS)]).encode("utf-8-sig")
    if kind == "jsonl":
        return "\r\n".join(json.dumps(row) for row in rows).encode("utf-16")
    if kind == "json":
        return json.dumps(rows).encode()
    sink = io.BytesIO()
    pq.write_table(pa.Table.from_pylist(rows), sink)
    return sink.getvalue()


@pytest.mark.parametrize("kind", ["csv", "jsonl", "json", "parquet"])
@pytest.mark.parametrize(("image", "caption"), [("image", "prompt"), ("file_name", "text"), ("image_path", "caption")])
def test_metadata(tmp_path: Path, kind: str, image: str, caption: str) -> None:
    base = folder_of(tmp_path, {path: JPEG for path, _ in ROWS} | {f"metadata.{kind}": metadata(kind, image, caption)})
    assert captions_of(Sources(base)) == dict(ROWS)
    listed = Sources(base, base / f"metadata.{kind}", image_column=image, caption_column=caption)
    assert captions_of(listed) == dict(ROWS)


def test_metadata_in_a_subfolder_and_elsewhere(tmp_path: Path) -> None:
    base = folder_of(tmp_path / "base", {"train/x.jpg": JPEG, "y.jpg": JPEG, "y.txt": "why"})
    folder_of(base, {"train/metadata.csv": "file_name,text\nx.jpg,ex\n"})
    assert captions_of(Sources(base)) == {"y.jpg": "why", "train/x.jpg": "ex"}
    folder_of(base, {"lists/all.csv": "image,prompt\ntrain/x.jpg,from the base\n"})
    assert captions_of(Sources(base, base / "lists/all.csv")) == {"train/x.jpg": "from the base"}
    folder_of(tmp_path, {"elsewhere.csv": "image,prompt\ny.jpg,from outside\n"})
    assert captions_of(Sources(base, tmp_path / "elsewhere.csv")) == {"y.jpg": "from outside"}
    absolute = json.dumps({"image_path": str(base / "y.jpg"), "caption": "absolute, but inside"})
    folder_of(tmp_path, {"musubi.jsonl": absolute})
    assert captions_of(Sources(base, tmp_path / "musubi.jsonl")) == {"y.jpg": "absolute, but inside"}


def test_rows_that_cannot_be_used_are_inputs_with_a_problem(tmp_path: Path) -> None:
    rows = [
        {"image": "gone.jpg", "prompt": "a"},
        {"image": None, "prompt": "b"},
        {"image": "x.jpg", "prompt": {"c": 1}},
    ]
    rows += [{"image": "x.jpg"}, {"image": "sub", "prompt": "d"}]
    base = folder_of(tmp_path, {"x.jpg": JPEG, "sub/empty.txt": "", "m.jsonl": "\n".join(map(json.dumps, rows))})
    found = list(Sources(base, base / "m.jsonl"))
    assert [item.problem and item.problem[0] for item in found] == [
        "file missing",
        "no image path",
        "caption not readable",
        None,
        "not a regular file",
    ]
    assert found[3].caption is None


def tar_of(path: Path, members: dict[str, bytes]) -> None:
    with tarfile.open(path, "w") as tar:
        for name, data in members.items():
            header = tarfile.TarInfo(name)
            header.size = len(data)
            tar.addfile(header, io.BytesIO(data))


def test_tars(tmp_path: Path) -> None:
    other = encoded(photo(48, 32))
    tar_of(
        tmp_path / "00000.tar",
        {
            "000.jpg": JPEG,
            "000.txt": b"text wins",
            "000.json": b'{"caption": "json"}',
            "dir/001.json": b'{"caption": "from json", "label": "other"}',
            "dir/001.png": other,
            "002.jpg": JPEG,
            "003.txt": b"no image",
        },
    )
    found = list(Sources(tmp_path))
    assert [(item.path, item.caption) for item in found] == [
        ("00000.tar/000.jpg", "text wins"),
        ("00000.tar/dir/001.png", "from json"),
        ("00000.tar/002.jpg", None),
    ]
    data = (tmp_path / "00000.tar").read_bytes()
    assert data[found[1].offset : found[1].offset + found[1].size] == other
    assert [item.caption for item in Sources(tmp_path, caption_column="label")] == [None, "other", None]


def test_a_broken_tar_gives_what_it_holds(tmp_path: Path) -> None:
    tar_of(tmp_path / "x.tar", {"000.jpg": JPEG, "000.txt": b"a", "001.jpg": JPEG, "001.txt": b"b"})
    whole = (tmp_path / "x.tar").read_bytes()
    (tmp_path / "x.tar").write_bytes(whole[: 512 + len(JPEG) // 2])
    found = list(Sources(tmp_path))
    assert found[-1].problem is not None and found[-1].problem[0] == "broken tar"


def test_duplicate_stems(tmp_path: Path) -> None:
    base = folder_of(tmp_path, {"a.jpg": JPEG, "a.k.jpg": JPEG, "a.png": JPEG, "a.txt": "both"})
    source = Sources(base)
    assert captions_of(source) == {"a.jpg": "both", "a.png": "both", "a.k.jpg": None}
    assert source.remarks.counts[SAME_STEM] == 1 and source.remarks.first[SAME_STEM] == "a.png"
    with pytest.raises(ValueError, match=r"a\.png: another image of this folder has the same name"):
        list(Sources(base, on_duplicate_stem="error"))


@pytest.mark.parametrize("path", ["../secret.jpg", "/etc/passwd", "sub/../../secret.jpg"])
def test_paths_that_lead_out_fail_and_the_run_goes_on(tmp_path: Path, path: str) -> None:
    base = folder_of(tmp_path / "base", {"x.jpg": JPEG, "m.csv": f"image,prompt\nx.jpg,a\n{path},b\n"})
    folder_of(tmp_path, {"secret.jpg": JPEG})
    first, second = Sources(base, base / "m.csv")
    assert (first.caption, first.problem) == ("a", None) and second.problem is not None and second.file == b""
    assert second.problem[0] == "outside of the folder"
    assert re.match(r"m\.csv line 3: image .* lies outside of --dataset_base_path", second.problem[1])


def test_links_that_lead_out_fail_and_the_run_goes_on(tmp_path: Path) -> None:
    folder_of(tmp_path, {"outside/secret.jpg": JPEG, "base/x.jpg": JPEG, "base/sub/y.jpg": JPEG})
    base = tmp_path / "base"
    (base / "loop").symlink_to(base)
    (base / "inside.jpg").symlink_to(base / "x.jpg")
    assert list(captions_of(Sources(base))) == ["inside.jpg", "x.jpg", "sub/y.jpg"]
    folder_of(tmp_path, {"outside/x.txt": "secret"})
    links = (("link.jpg", "secret.jpg"), ("link", ""), ("x.txt", "x.txt"), ("l.tar", "x.tar"), ("l.parquet", "x.tar"))
    for name, target in links:
        link = base / name
        link.symlink_to(tmp_path / "outside" / target)
        found = {item.path: item.problem for item in Sources(base)}
        assert list(found).count("sub/y.jpg") == 1, "the others are still found"
        (reason, detail) = found["x.jpg" if name == "x.txt" else name] or ("", "")
        assert reason == "outside of the folder" and "outside of --dataset_base_path" in detail, (name, found)
        followed = {item.path: item.problem for item in Sources(base, allow_links=True)}
        assert all(problem is None or problem[0] != reason for problem in followed.values())
        link.unlink()


def test_clear_errors(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="nowhere: no such folder"):
        Sources(tmp_path / "nowhere")
    with pytest.raises(FileNotFoundError, match=r"m\.csv: no such file"):
        Sources(tmp_path, tmp_path / "m.csv")
    for name, content, message in (
        ("m.csv", "foo,bar\n1,2\n", "no column image or file_name or .*, only foo, bar .*: name it with --image"),
        (
            "m.csv",
            "image,bar\n1,2\n",
            "no column prompt or text or caption or captions, only image, bar .*: name it with --caption",
        ),
        ("m.csv", "a.jpg,one\nb.jpg,two\n", "the first line must name the columns"),
        ("m.json", "{}", "must be a list of objects, not dict"),
        ("m.jsonl", '{"a": 1}', "no column image or file_name"),
        ("m.parquet", "PAR1", "not valid parquet"),
        ("m.xlsx", "", "metadata must be one of .csv, .tsv, .jsonl, .json, .parquet"),
    ):
        folder_of(tmp_path, {name: content})
        with pytest.raises(ValueError, match=message):
            list(Sources(tmp_path, tmp_path / name))
    folder_of(tmp_path, {"metadata.csv": "image,prompt\n", "metadata.jsonl": ""})
    with pytest.raises(ValueError, match=r"holds metadata\.csv and metadata\.jsonl: say which"):
        list(Sources(tmp_path))


def test_links_to_nowhere_and_to_themselves_do_not_end_the_walk(tmp_path: Path) -> None:
    base = folder_of(tmp_path, {"a.jpg": JPEG, "sub/b.jpg": JPEG})
    for name, target in (("self", "self"), ("self.jpg", "self.jpg"), ("gone.tar", "gone"), ("sub/loop", str(base))):
        (base / name).symlink_to(target)
    found = {item.path: item.problem and item.problem[0] for item in Sources(base)}
    assert found == {"a.jpg": None, "sub/b.jpg": None, "self.jpg": "file missing", "gone.tar": "broken tar"}


def test_output_within_the_base_is_not_an_input(tmp_path: Path) -> None:
    base = folder_of(tmp_path, {"x.jpg": JPEG, "out/y.jpg": JPEG})
    assert [item.path for item in Sources(base, exclude=base / "out")] == ["x.jpg"]
    assert isinstance(next(iter(Sources(base))), Input)
    with pytest.raises(ValueError, match="is --dataset_base_path: its tars would be the next run's inputs"):
        Sources(base, exclude=base / "out" / "..")
