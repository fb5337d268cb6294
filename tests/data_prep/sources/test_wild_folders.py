"""Folders as people have them: what isn't an input is counted and named, and nothing hangs or ends the run."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from data_prep.images import formats
from data_prep.sources import remarks
from data_prep.sources.find_inputs import Sources
from tests.helpers.photos import encoded, photo

JPEG = encoded(photo(32, 32))


def put(root: Path, files: dict[str, bytes | str]) -> Path:
    for name, content in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content if isinstance(content, bytes) else content.encode("utf-8", "surrogateescape"))
    return root


def seen(source: Sources) -> dict[str, str | None]:
    """path -> reason, or its caption."""
    return {item.path: item.problem[0] if item.problem else item.caption for item in source}


# ── files that are none ──────────────────────────────────────────────────────────────────────────────────────────────


def test_fifos_devices_and_sockets_are_never_opened(tmp_path: Path) -> None:
    base = put(tmp_path / "in", {"x.jpg": JPEG, "x.txt": "x", "a.jpg": JPEG, "c.jpg": JPEG})
    for name in ("a.txt", "f.jpg", "t.tar", "p.parquet"):
        os.mkfifo(base / name)
    (base / "c.txt").symlink_to("/dev/zero")
    assert seen(Sources(base, allow_links=True)) == {
        "x.jpg": "x",
        "a.jpg": "caption not readable",
        "c.jpg": "caption not readable",
        "f.jpg": "not a regular file",
        "t.tar": "broken tar",
        "p.parquet": "not a regular file",
    }
    os.mkfifo(base / "metadata.csv")
    with pytest.raises(ValueError, match=r"metadata\.csv: not a regular file but a FIFO"):
        list(Sources(base))
    with pytest.raises(ValueError, match="not a regular file"):
        list(Sources(base, base / "metadata.csv"))


def test_an_unreadable_folder_is_one_failed_input(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    base = put(tmp_path, {"x.jpg": JPEG, "x.txt": "x", "locked/y.jpg": JPEG, "z/z.jpg": JPEG, "z/z.txt": "z"})
    scan = os.scandir

    def refusing(folder: str):
        if str(folder).endswith("locked"):
            raise PermissionError(13, "Permission denied", folder)
        return scan(folder)

    monkeypatch.setattr(os, "scandir", refusing)  # root can read everything
    assert seen(Sources(base)) == {"x.jpg": "x", "locked": "unreadable folder", "z/z.jpg": "z"}


def test_names_of_any_bytes(tmp_path: Path) -> None:
    names = [b"new\nline", b"\x1b[2Jclear", b"\xff\xfe", b"--help", b"x" * 240, "日本".encode(), b" lead", b"a.tar"]
    for name in names:
        for ending, content in ((b".jpg", JPEG), (b".txt", b"caption")):
            with open(os.path.join(os.fsencode(tmp_path), name + ending), "wb") as file:
                file.write(content)
    items = list(Sources(tmp_path))
    assert sorted(item.file for item in items) == sorted(name + b".jpg" for name in names)
    assert all(item.caption == "caption" for item in items)


# ── what is left out ─────────────────────────────────────────────────────────────────────────────────────────────────


def test_own_sets_below_the_photos_are_left_out_and_said(tmp_path: Path) -> None:
    manifest = json.dumps({"format_version": 1, "payload": "jpg", "shards": []})
    plan = json.dumps({"fingerprint": "f", "shard_rows": []})
    base = put(
        tmp_path,
        {"x.jpg": JPEG, "x.txt": "x", "out/manifest.json": manifest, "out/y.jpg": JPEG, "begun/plan/plan.json": plan,
         "begun/z.jpg": JPEG, "app/manifest.json": '{"name": "a web page"}', "app/w.jpg": JPEG, "app/w.txt": "w"},
    )  # fmt: skip
    source = Sources(base)
    assert seen(source) == {"x.jpg": "x", "app/w.jpg": "w"}
    assert source.remarks.counts[remarks.OWN_FOLDERS] == 2 and source.remarks.first[remarks.OWN_FOLDERS] == "begun"
    assert seen(Sources(base / "out")) == {"y.jpg": None}  # when it is what is asked for


def test_formats_that_need_more_are_inputs_with_the_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(formats, "installed_plugins", lambda: ())
    base = put(tmp_path, {"a.HEIC": b"x", "b.jxl": b"x", "c.dng": b"x", "d.NEF": b"x", "e.jpg": JPEG, "e.txt": "e"})
    found = {item.path: item.problem for item in Sources(base)}
    reader = "no reader for this format"
    assert found["a.HEIC"] == (reader, ".heic: pip install '.[heic]' reads it")
    assert found["b.jxl"] == (reader, ".jxl: pip install '.[jxl]' reads it")
    assert found["c.dng"] == found["d.NEF"] == (reader, "camera raw: export it as TIFF or JPEG first")
    assert found["e.jpg"] is None


def test_repeats_placeholders_and_long_captions_are_said_once(tmp_path: Path) -> None:
    base = put(
        tmp_path,
        {"10_cat/a.jpg": JPEG, "10_cat/a.txt": "a [trigger]", "10_cat/b.jpg": JPEG, "10_cat/b.txt": "{a|b} " + "word " * 600,
         "1_reg/c.jpg": JPEG, "1_reg/c.txt": "word " * 3000, "2024/d.jpg": JPEG, "2024/d.txt": "d"},
    )  # fmt: skip
    source = Sources(base)
    assert len(seen(source)) == 4
    counts = source.remarks.counts
    assert (counts[remarks.REPEATS], counts[remarks.PLACEHOLDERS]) == (2, 2)
    assert (counts[remarks.CUT_UNLESS_RAISED], counts[remarks.CUT_ANYWAY]) == (1, 1)
    assert any(line.startswith("2 images lie in kohya's repeat folders") for line in source.remarks.lines())


def test_where_a_caption_was_looked_for(tmp_path: Path) -> None:
    files = {"a.jpg": JPEG, "a.jpg.txt": "x", "b.jpg": JPEG, "b.json": "{}", "c.jpg": JPEG, "C.txt": "x", "d.png": JPEG}
    base = put(tmp_path, files | {"captions.csv": "x", "captions/d.txt": "x", "lonely.txt": "x"})
    source = Sources(base)
    hints = {item.path: item.hint for item in source}
    assert "looked for a.txt and a.caption; there is a.jpg.txt, captions.csv, a folder captions/" in hints["a.jpg"]
    assert "b.json" in hints["b.jpg"] and "C.txt" in hints["c.jpg"] and "captions/" in hints["d.png"]
    assert source.remarks.counts[remarks.LONELY_CAPTIONS] == 4
    apart = put(tmp_path / "apart", {"images/a.jpg": JPEG, "captions/a.txt": "x"})
    assert [item.hint for item in Sources(apart)] == ["looked for a.txt and a.caption; there is a folder ../captions/"]


# ── metadata ─────────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("metadata.csv", "image, caption\na.jpg, A dragon\n"),
        ("metadata.csv", 'Image,Caption\na.jpg,"A dragon"\n'),
        ("metadata.csv", "filename;text\na.jpg;A dragon\n"),
        ("metadata.csv", "file_name\ttext\na.jpg\tA dragon\n"),
        ("metadata.csv", "\n\nfile_name,text\n\na.jpg,A dragon\n\n".lstrip("\n")),
        ("metadata.jsonl", '{"file_name": "a.jpg", "text": "A dragon"}\n'),
        ("metadata.json", '[{"Image": "a.jpg", "CAPTION": "A dragon"}]'),
    ],
)
def test_headers_as_people_write_them(tmp_path: Path, name: str, content: str) -> None:
    assert seen(Sources(put(tmp_path, {"a.jpg": JPEG, name: content}))) == {"a.jpg": "A dragon"}


def test_bad_rows_are_named_and_the_others_are_read(tmp_path: Path) -> None:
    lines = [
        '{"file_name": "a.jpg"}',
        '{"file_name": "a.jpg", "text": "x"}',
        "[" * 200_000,
        '{"file_name": "b.jpg",',
        "7",
    ]
    lines += [
        '{"text": "no image"}',
        '{"file_name": "a\\u0000.jpg", "text": "x"}',
        '{"file_name": "\\ud800.jpg", "text": "x"}',
    ]
    lines += [
        '{"file_name": "a.jpg", "text": true}',
        '{"file_name": "' + "n" * 300 + '.jpg", "text": "x"}',
        '{"n": ' + "1" * 5000 + "}",
    ]
    base = put(tmp_path, {"a.jpg": JPEG, "metadata.jsonl": "\n".join(lines)})
    items = list(Sources(base))
    assert [item.problem and item.problem[0] for item in items] == [
        None,
        None,
        "metadata row not readable",
        "metadata row not readable",
        "metadata row not readable",
        "no image path",
        "no image path",
        "no image path",
        "caption not readable",
        "file missing",
        "metadata row not readable",
    ]
    assert items[2].path == "metadata.jsonl line 3" and "nested too deep" in items[2].problem[1]


def test_csv_rows_that_are_no_rows(tmp_path: Path) -> None:
    content = b'file_name,text\na.jpg,one\nb.jpg,one, two\nb.jpg,caf\xe9\nc\0.jpg,x\na.jpg,x\0y\na.jpg,"unclosed\n'
    source = Sources(put(tmp_path, {"a.jpg": JPEG, "b.jpg": JPEG, "metadata.csv": content}))
    found = [(item.path, item.problem and item.problem[0]) for item in source]
    assert found == [
        ("a.jpg", None),
        ("metadata.csv line 3", "metadata row not readable"),
        ("b.jpg", "caption not readable"),
        ("metadata.csv line 5", "no image path"),
        ("a.jpg", "caption not readable"),
        ("metadata.csv line 7", "metadata row not readable"),
    ]


def test_images_listed_twice_and_not_at_all(tmp_path: Path) -> None:
    files = {f"{name}.jpg": JPEG for name in ("a", "b", "sub/c")}
    base = put(tmp_path, files | {"metadata.csv": "file_name,text\na.jpg,1\n./a.jpg,2\na.jpg,3\n"})
    source = Sources(base)
    assert len(list(source)) == 3
    assert source.remarks.counts[remarks.LISTED_TWICE] == 2 and source.remarks.counts[remarks.UNLISTED] == 2
    assert source.remarks.first[remarks.UNLISTED] == "b.jpg"


def test_a_missing_image_says_where_it_was_looked_for(tmp_path: Path) -> None:
    rows = "A.jpg,x\nphotos\\b.jpg,x\nhttps://example.com/c.jpg,x\na,x\n"
    base = put(tmp_path, {"a.jpg": JPEG, "photos/b.jpg": JPEG, "metadata.csv": "file_name,text\n" + rows})
    items = list(Sources(base))
    details = [item.problem[1] if item.problem else None for item in items]
    assert f"looked for {base}/A.jpg; there is a.jpg" in details[0] and "metadata.csv line 2" in details[0]
    assert details[1] is None and items[1].path == "photos/b.jpg"  # Windows' separators
    assert "an address, not a file: download it first" in details[2] and "there is a.jpg" in details[3]


def test_a_broken_metadata_file_of_a_subfolder_is_one_failure(tmp_path: Path) -> None:
    base = put(
        tmp_path / "in", {"x.jpg": JPEG, "x.txt": "x", "good/y.jpg": JPEG, "good/metadata.csv": "image,text\ny.jpg,y\n"}
    )
    put(base, {"cut/metadata.json": '[{"ima', "cut/z.jpg": JPEG, "names/metadata.csv": "a,b\n1,2\n"})
    put(base, {"two/metadata.csv": "image,text\n", "two/metadata.jsonl": ""})
    os.makedirs(base / "fifo")
    os.mkfifo(base / "fifo/metadata.jsonl")
    broken = "metadata file not readable"
    assert seen(Sources(base)) == {
        "x.jpg": "x",
        "good/y.jpg": "y",
        "cut/metadata.json": broken,
        "names/metadata.csv": broken,
        "two/metadata.csv": broken,
        "fifo/metadata.jsonl": broken,
    }
    with pytest.raises(ValueError, match="not valid JSON"):
        list(Sources(base / "cut"))


def test_a_linked_metadata_file_that_leads_out_is_not_read(tmp_path: Path) -> None:
    put(tmp_path, {"secret.csv": "root:x:0:0,text\n1,2\n"})
    base = put(tmp_path / "in", {"sub/x.jpg": JPEG})
    (base / "sub/metadata.csv").symlink_to(tmp_path / "secret.csv")
    assert seen(Sources(base)) == {"sub/metadata.csv": "metadata file not readable"}
    with pytest.raises(ValueError, match=r"is a link to .*outside of --dataset_base_path") as error:
        list(Sources(base / "sub"))
    assert "x:0:0" not in str(error.value), "nothing of its content is shown"


def test_what_a_metadata_file_shadows_is_said(tmp_path: Path) -> None:
    base = put(
        tmp_path / "in", {"x.jpg": JPEG, "metadata.csv": "image,text\nx.jpg,x\n", "a.tar": b"", "s/p.parquet": b""}
    )
    put(base, {"s/metadata.csv": "image,text\n", "s/y.jpg": JPEG})
    source = Sources(base)
    assert seen(source) == {"x.jpg": "x"}
    assert source.remarks.counts == {remarks.UNLISTED_TARS: 2, remarks.NESTED_LISTINGS: 1, remarks.UNLISTED: 1}


@pytest.mark.parametrize("header", ["image,text,text", "image,image,text", "image,text,text ,"])
def test_a_column_that_is_there_twice_is_refused(tmp_path: Path, header: str) -> None:
    base = put(tmp_path / "in", {"x.jpg": JPEG, "metadata.csv": f"{header}\nx.jpg,one,two\n"})
    with pytest.raises(ValueError, match="more than once in its header"):
        list(Sources(base))
    put(base, {"metadata.csv": "image,text,id,id\nx.jpg,one,1,2\n"})
    assert seen(Sources(base)) == {"x.jpg": "one"}


def test_several_columns_that_could_be_meant_are_said(tmp_path: Path) -> None:
    base = put(tmp_path / "in", {"x.jpg": JPEG, "metadata.csv": "image,Caption,text\nx.jpg,long,short\n"})
    source = Sources(base)
    assert seen(source) == {"x.jpg": "short"}
    assert source.remarks.first[remarks.SEVERAL_COLUMNS] == "metadata.csv: text and caption"
    named = Sources(base, caption_column="caption")
    assert seen(named) == {"x.jpg": "long"} and not named.remarks.counts


def test_lost_characters_and_infinite_numbers(tmp_path: Path) -> None:
    lines = ('{"image": "x.jpg", "text": 1e999}', '{"image": "x.jpg", "text": "caf\ufffd"}')
    base = put(tmp_path / "in", {"x.jpg": JPEG, "metadata.jsonl": "\n".join(lines)})
    source = Sources(base)
    assert [item.problem and item.problem[0] for item in source] == ["caption not readable", None]
    assert source.remarks.counts[remarks.LOST_CHARACTERS] == 1
