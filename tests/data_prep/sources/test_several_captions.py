"""Several captions of one image: lines, lists, columns, captions.json; then packed, checked, shown, packed again and read."""

from __future__ import annotations

import hashlib
import io
import json
import shutil
import tarfile
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

from data_prep import check_shards, make_shards
from data_prep.encoding.caption_variants import CaptionOptions, caption_chance
from data_prep.shard_format.scan_tars import build_index
from data_prep.shard_format.shards import read_index, read_manifest
from data_prep.sources import captions
from data_prep.sources.find_inputs import Sources
from tests.helpers.photos import encoded, folder_of, photo
from train.data.shard_dataset import ShardDataset

JPEG = encoded(photo(64, 64))


def found(source: Sources) -> dict[str, list[str | None]]:
    return {item.path: [item.caption, *item.more_captions] for item in source}


def remark(source: Sources, part: str) -> list[str]:
    return [line for line in source.remarks.lines() if part in line]


# ── where they come from ─────────────────────────────────────────────────────────────────────────────────────────────


def test_lines_are_captions_by_flag_alone(tmp_path):
    base = folder_of(tmp_path, {"a.jpg": JPEG, "a.txt": "one\r\n\n  two  \nthree\n", "b.jpg": JPEG, "b.txt": "\n \n"})
    assert found(Sources(base)) == {"a.jpg": ["one\n\n  two  \nthree"], "b.jpg": [""]}
    source = Sources(base, caption_lines=True)
    assert found(source) == {"a.jpg": ["one", "two", "three"], "b.jpg": [""]}
    assert remark(source, "several captions") == [
        "1 images have several captions, of which training draws one each time (docs/levers.md); first a.jpg"
    ]


def test_a_bad_caption_among_several_is_named_and_the_others_stay(tmp_path):
    rows = [
        {"image": "a.jpg", "captions": ["good", 1.5, None, "", "b\x1bd", ["nested"], "e\u0301"]},
        {"image": "a.jpg", "captions": ["b\x1bd", True]},
        {"image": "a.jpg", "captions": []},
        {"image": "a.jpg", "captions": ["", None]},
        {"image": "a.jpg", "captions": {"en": "no"}},
    ]
    base = folder_of(tmp_path, {"a.jpg": JPEG, "m.jsonl": "\n".join(map(json.dumps, rows))})
    source = Sources(base, base / "m.jsonl")
    items = list(source)
    assert [(item.caption, item.more_captions) for item in items] == [
        ("good", ("1.5", "é")),
        (None, ()),
        (None, ()),
        ("", ()),
        (None, ()),
    ]
    assert [item.problem and item.problem[1] for item in items] == [
        None,
        "m.jsonl line 2: caption 1 of 2: a control character (code 27) at character 1: not text; remove it",
        None,
        None,
        "m.jsonl line 5: a caption must be text, not dict",
    ]
    assert remark(source, "among several") == [
        "2 captions among several of one image can't be read, and are left out; first m.jsonl line 1: caption 5 of 7: "
        "a control character (code 27) at character 1: not text; remove it"
    ]
    lines = folder_of(tmp_path / "lines", {"a.jpg": JPEG, "a.txt": b"one\nb\x1bd\nthree"})
    assert found(Sources(lines)) == {"a.jpg": [None]}, "as one caption it can't be read"
    source = Sources(lines, caption_lines=True)
    assert found(source) == {"a.jpg": ["one", "three"]}
    assert "first a.txt: caption 2 of 3: a control character" in remark(source, "1 captions among several")[0]


@pytest.mark.parametrize("kind", ["jsonl", "json", "parquet", "csv"])
def test_lists_and_named_columns_of_every_kind_of_metadata(tmp_path, kind):
    rows = [
        {"image": "a.jpg", "short": "cat", "long": "a cat on a sofa"},
        {"image": "b.jpg", "short": "dog", "long": None},
    ]
    base = folder_of(tmp_path, {"a.jpg": JPEG, "b.jpg": JPEG})
    path = base / f"m.{kind}"
    if kind == "parquet":
        pq.write_table(pa.Table.from_pylist(rows), path)
    elif kind == "csv":
        path.write_text("image,short,long\na.jpg,cat,a cat on a sofa\nb.jpg,dog,\n")
    else:
        path.write_text(json.dumps(rows) if kind == "json" else "\n".join(map(json.dumps, rows)))
    source = Sources(base, path, caption_column="short, long")
    assert found(source) == {"a.jpg": ["cat", "a cat on a sofa"], "b.jpg": ["dog"]}
    assert found(Sources(base, path, caption_column="long"))["a.jpg"] == ["a cat on a sofa"]
    with pytest.raises(ValueError, match=r"has no column lang, only image, short, long.*--caption_column"):
        list(Sources(base, path, caption_column="short,lang"))
    if kind != "csv":
        lists = [{"image": "a.jpg", "caption": ["one", "two"]}, {"image": "b.jpg", "caption": ["three"]}]
        if kind == "parquet":
            pq.write_table(pa.Table.from_pylist(lists), path)
        else:
            path.write_text(json.dumps(lists) if kind == "json" else "\n".join(map(json.dumps, lists)))
        assert found(Sources(base, path)) == {"a.jpg": ["one", "two"], "b.jpg": ["three"]}


def test_parquet_with_images_and_lists_of_captions_and_several_columns(tmp_path):
    rows = [{"image": {"bytes": JPEG, "path": "x.jpg"}, "caption": ["one", "two"], "more": "three"}]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "p.parquet")
    assert list(found(Sources(tmp_path)).values()) == [["one", "two"]]
    assert list(found(Sources(tmp_path, caption_column="caption,more")).values()) == [["one", "two", "three"]]
    (item,) = Sources(tmp_path, caption_column="caption,lang")
    assert item.caption is None and item.hint.startswith("no column lang, only image, caption, more")


def test_tars_have_lists_lines_and_columns_too(tmp_path):
    members = {"a.jpg": JPEG, "a.json": b'{"caption": ["one", "two"], "tags": "x, y"}', "b.jpg": JPEG, "b.txt": b"p\nq"}
    tar_of(tmp_path / "t.tar", members)
    assert found(Sources(tmp_path)) == {"t.tar/a.jpg": ["one", "two"], "t.tar/b.jpg": ["p\nq"]}
    assert found(Sources(tmp_path, caption_lines=True))["t.tar/b.jpg"] == ["p", "q"]
    assert found(Sources(tmp_path, caption_column="caption,tags"))["t.tar/a.jpg"] == ["one", "two", "x, y"]


def tar_of(path: Path, members: dict[str, bytes]) -> None:
    with tarfile.open(path, "w") as tar:
        for name, data in members.items():
            header = tarfile.TarInfo(name)
            header.size = len(data)
            tar.addfile(header, io.BytesIO(data))


def test_captions_json_speaks_for_its_folder_and_those_below(tmp_path):
    listed = {
        "a.jpg": "by name",
        "b": ["by stem", "and another"],
        "./sub/c.jpg": "below",
        "sub\\d": {"caption": "an object's", "tags": "x"},
        "has_txt.jpg": "not this",
        "nobody.jpg": "?",
        "e\u0301.jpg": "decomposed",
        "bad.jpg": 1e999,
    }
    files = dict.fromkeys(
        ("a.jpg", "b.jpg", "sub/c.jpg", "sub/d.jpg", "sub/f.jpg", "has_txt.jpg", "é.jpg", "bad.jpg"), JPEG
    )
    files |= {"captions.json": json.dumps(listed), "has_txt.txt": "beside", "sub/captions.json": '{"f": "nearest"}'}
    base = folder_of(tmp_path, files)
    source = Sources(base)
    assert found(source) == {
        "a.jpg": ["by name"],
        "b.jpg": ["by stem", "and another"],
        "bad.jpg": [None],
        "has_txt.jpg": ["beside"],
        "é.jpg": ["decomposed"],
        "sub/c.jpg": ["below"],
        "sub/d.jpg": ["an object's"],
        "sub/f.jpg": ["nearest"],
    }
    assert ".json" not in source.ignored
    assert remark(source, "name no image")[0].startswith("2 entries of captions.json")
    assert [item.problem[1] for item in source if item.problem] == [
        "bad.jpg in captions.json: a caption must be text, not an infinite number"
    ]
    explicit = Sources(
        folder_of(tmp_path / "x", {"a.jpg": JPEG, "m.json": '{"a.jpg": ["one", "two"]}'}), tmp_path / "x/m.json"
    )
    assert found(explicit) == {"a.jpg": ["one", "two"]}


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ("[1]", "begins with a brace, this is a list"),
        ("{", "not valid JSON"),
        (b"\xff\xfe{", "not valid JSON"),
        ("[" * 100_000, "not valid JSON"),
    ],
)
def test_a_captions_json_that_is_no_map_is_named_and_changes_nothing(tmp_path, content, said):
    base = folder_of(tmp_path, {"a.jpg": JPEG, "a.txt": "beside", "b.jpg": JPEG, "captions.json": content})
    source = Sources(base)
    assert found(source) == {"a.jpg": ["beside"], "b.jpg": [None]}
    assert said in remark(source, "captions.json files can't be read")[0] and source.ignored[".json"] == 1


@given(st.lists(st.one_of(st.text(max_size=8), st.none(), st.integers(), st.booleans(), st.floats()), max_size=6))
def test_whatever_stands_in_a_list_gives_clean_captions_or_one_error(cells):
    try:
        got = captions.several([cells])
    except ValueError as error:
        assert str(error)
        return
    assert all(isinstance(text, str) and captions.clean(text) == text for text in got.captions)
    assert got.more == () or all(got.captions), "empty ones only where there is no other"


# ── packed ───────────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.fixture(scope="module")
def photos(tmp_path_factory) -> Path:
    files: dict[str, bytes | str] = {f"{number}.jpg": encoded(photo(64, 64, seed=number)) for number in range(6)}
    files |= {f"{number}.txt": f"photo {number}\nanother of {number}, longer" for number in (0, 2, 5)}
    files |= {f"{number}.txt": f"only one {number}" for number in (1, 3, 4)}
    return folder_of(tmp_path_factory.mktemp("several") / "photos", files)


def pack(photos: Path, output: Path, *more: str) -> int:
    flags = ["--dataset_base_path", str(photos), "--output_path", str(output), "--num_workers", "0"]
    return make_shards.main([*flags, "--samples_per_shard", "2", *more])


@pytest.fixture(scope="module")
def shards(photos, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("packed") / "shards"
    assert pack(photos, folder, "--caption_lines") == 0
    return folder


def test_shards_keep_the_first_caption_as_text_and_all_in_json_where_there_are_several(shards):
    texts, records = {}, {}
    for tar in sorted(shards.glob("*.tar")):
        with tarfile.open(tar) as file:
            for member in file:
                data = file.extractfile(member).read()
                texts |= {member.name[:12]: data.decode()} if member.name.endswith("txt") else {}
                records |= {member.name[:12]: json.loads(data)} if member.name.endswith("json") else {}
    assert [texts[key] for key in sorted(texts)] == [
        f"{'photo' if n in (0, 2, 5) else 'only one'} {n}" for n in range(6)
    ]
    for key, record in records.items():
        number = int(record["path"][0])
        assert record["caption"] == texts[key]
        several = [f"photo {number}", f"another of {number}, longer"]
        assert record.get("captions") == (several if number in (0, 2, 5) else None)
    index = read_index(shards)
    assert index.captions.tolist() == [2, 1, 2, 1, 1, 2]
    assert index.longest_caption[0] == len("another of 0, longer") and index.caption_length[0] == len("photo 0")
    assert read_manifest(shards).totals["several_captions"] == 3


def test_check_and_report_know_them(shards, tmp_path, capsys):
    assert check_shards.main([str(shards), "--num_workers", "0", "--report", str(tmp_path / "r.html")]) == 0
    page = (tmp_path / "r.html").read_text()
    assert "3 samples with several captions, 9 captions in all" in page and "another of 5, longer" in page
    assert "with several captions" in page


def test_a_damaged_list_is_found(shards, tmp_path, capsys):
    folder = shutil.copytree(shards, tmp_path / "damaged")
    tar = folder / "000000.tar"
    tar.write_bytes(tar.read_bytes().replace(b'"another of 0, longer"', b'"another of 0, longe"  '[:22]))
    manifest = json.loads((folder / "manifest.json").read_text())
    digest = hashlib.sha256(tar.read_bytes()).hexdigest()
    manifest["shards"][0]["sha256"] = digest
    (folder / "manifest.json").write_text(json.dumps(manifest))
    assert check_shards.main([str(folder), "--num_workers", "0"]) == 1
    assert "json has 2 captions, the longest of 19 characters, the index says 2 and 20" in capsys.readouterr().err


def test_the_list_is_part_of_a_sets_identity_and_the_flag_alone_is_not(photos, shards, tmp_path, capsys):
    plain = tmp_path / "plain"
    assert pack(photos, plain) == 0
    assert read_manifest(plain).fingerprint != read_manifest(shards).fingerprint
    assert pack(photos, plain, "--caption_lines") == 2
    assert "inputs changed" in capsys.readouterr().err
    single = folder_of(tmp_path / "single", {"a.jpg": JPEG, "a.txt": "one"})
    assert pack(single, tmp_path / "one") == 0 and pack(single, tmp_path / "lines", "--caption_lines") == 0
    for name in ("manifest.json", "index.parquet", "000000.tar", "000000.parquet", "plan/plan.parquet"):
        assert (tmp_path / "one" / name).read_bytes() == (tmp_path / "lines" / name).read_bytes(), name
    names = read_index_names(tmp_path / "one")
    assert "captions" not in names and "captions" in read_index_names(shards)


def read_index_names(folder: Path) -> list[str]:
    return pq.read_schema(folder / "index.parquet").names


def test_packing_the_shards_again_keeps_all_captions(shards, tmp_path):
    again = tmp_path / "again"
    assert pack(shards, again) == 0
    everything = [ShardDataset(folder) for folder in (shards, again)]
    assert everything[0].index.captions.tolist() == everything[1].index.captions.tolist()
    bare = tmp_path / "bare"
    bare.mkdir()
    for tar in shards.glob("*.tar"):
        shutil.copy(tar, bare)
    build_index(bare)
    assert read_index(bare).captions.tolist() == [2, 1, 2, 1, 1, 2]


def test_training_draws_one_of_them_and_without_chance_takes_the_first(shards):
    dataset = ShardDataset(shards, captions=CaptionOptions(trigger_word="zwx"))
    assert [dataset.read(n).caption for n in (0, 1)] == ["zwx, photo 0", "zwx, only one 1"]
    drawn = {dataset.read(0, lambda epoch=epoch: caption_chance(0, epoch, 0)).caption for epoch in range(20)}
    assert drawn == {"zwx, photo 0", "zwx, another of 0, longer"}
    assert dataset.read(1, lambda: pytest.fail("nothing is left to chance")).caption == "zwx, only one 1"
