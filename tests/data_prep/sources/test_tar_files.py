"""Tars of all dialects: every image is read, or counted with its reason."""

from __future__ import annotations

import io
import subprocess
import tarfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from data_prep.images.header import ImageOptions
from data_prep.packing import workers
from data_prep.shard_format.scan_tars import tar_samples
from data_prep.shard_format.tar_members import BrokenTar, tar_members
from data_prep.sources.find_inputs import Sources
from data_prep.sources.found_input import SPARSE, Input
from data_prep.sources.remarks import HIDDEN, LONELY_CAPTIONS, NAMED_TWICE, OTHER_MEMBERS
from tests.helpers.photos import encoded, opened, photo

ONE, TWO = encoded(photo(32, 32, seed=1)), encoded(photo(32, 32, seed=2))
FORMATS = {"gnu": tarfile.GNU_FORMAT, "pax": tarfile.PAX_FORMAT, "ustar": tarfile.USTAR_FORMAT}


def tar_of(path: Path, members: list[tuple], dialect: int = tarfile.GNU_FORMAT) -> Path:
    """Members (name, content or None, attributes of its header)."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w", format=dialect) as tar:
        for name, data, *more in members:
            header = tarfile.TarInfo(name)
            header.size = len(data or b"")
            for key, value in (more[0] if more else {}).items():
                setattr(header, key, value)
            tar.addfile(header, io.BytesIO(data) if data else None)
    return path


def bytes_of(base: Path, item: Input) -> bytes:
    return workers._content(workers.Job(bytes(base), ImageOptions()), item)


def found_in(base: Path) -> list[tuple[str, str | None]]:
    return [(item.path, item.problem[0] if item.problem else item.caption) for item in Sources(base)]


@pytest.mark.parametrize("dialect", list(FORMATS))
def test_dialects_and_long_names(tmp_path: Path, dialect: str) -> None:
    long = "d/" + ("n" * 300 if dialect != "ustar" else "n" * 90)
    name = "é日" if dialect != "ustar" else "e"
    members = [(f"{name}.jpg", ONE), (f"{name}.txt", b"first"), (f"{long}.jpg", TWO), (f"{long}.txt", b"long")]
    tar_of(tmp_path / "s.tar", members, FORMATS[dialect])
    items = list(Sources(tmp_path))
    assert [(item.path, item.caption) for item in items] == [
        (f"s.tar/{name}.jpg", "first"),
        (f"s.tar/{long}.jpg", "long"),
    ]
    assert [bytes_of(tmp_path, item) for item in items] == [ONE, TWO]


def test_dotted_names_and_members_apart(tmp_path: Path) -> None:
    members = [("photo v1.2.jpg", ONE), ("photo v1.3.jpg", TWO), ("./000.img.png", ONE), ("a.jpg", ONE), ("b.jpg", TWO)]
    members += [("b.txt", b"bee"), ("a.caption", b"ay"), ("photo v1.3.txt", b"three"), ("photo v1.2.txt", b"two")]
    tar_of(tmp_path / "s.tar", [*members, ("000.json", b'{"caption": "by its first dot"}')])
    assert found_in(tmp_path) == [
        ("s.tar/photo v1.2.jpg", "two"),
        ("s.tar/photo v1.3.jpg", "three"),
        ("s.tar/000.img.png", "by its first dot"),
        ("s.tar/a.jpg", "ay"),
        ("s.tar/b.jpg", "bee"),
    ]


def test_a_name_that_comes_twice_loses_nothing(tmp_path: Path) -> None:
    tar_of(tmp_path / "s.tar", [("a.jpg", ONE), ("a.txt", b"one"), ("a.jpg", TWO), ("a.txt", b"two")])
    source = Sources(tmp_path)
    items = list(source)
    assert [item.caption for item in items] == ["one", "two"]
    assert [bytes_of(tmp_path, item) for item in items] == [ONE, TWO]
    assert source.remarks.counts[NAMED_TWICE] == 1


def test_links_are_followed_within_the_tar(tmp_path: Path) -> None:
    hard, soft = {"type": tarfile.LNKTYPE}, {"type": tarfile.SYMTYPE}
    members = [("d/h1.jpg", ONE), ("d/h1.txt", b"caption"), ("h2.jpg", None, hard | {"linkname": "d/h1.jpg"})]
    members += [
        ("h2.txt", None, hard | {"linkname": "d/h1.txt"}),
        ("d/s.jpg", None, soft | {"linkname": "../later.jpg"}),
    ]
    members += [("d/s.txt", b"soft"), ("later.jpg", TWO), ("later.txt", b"later")]
    members += [
        ("out.jpg", None, soft | {"linkname": "/etc/passwd"}),
        ("loop.jpg", None, soft | {"linkname": "loop.jpg"}),
    ]
    members += [
        ("dev.jpg", None, {"type": tarfile.CHRTYPE, "devmajor": 1, "devminor": 5}),
        ("f.png", None, {"type": tarfile.FIFOTYPE}),
    ]
    tar_of(tmp_path / "s.tar", members)
    found = dict(found_in(tmp_path))
    assert found == {
        "s.tar/d/h1.jpg": "caption",
        "s.tar/h2.jpg": "caption",
        "s.tar/d/s.jpg": "soft",
        "s.tar/later.jpg": "later",
        "s.tar/out.jpg": "link to nothing in its tar",
        "s.tar/loop.jpg": "link to nothing in its tar",
        "s.tar/dev.jpg": "not a regular file",
        "s.tar/f.png": "not a regular file",
    }
    content = {item.path: bytes_of(tmp_path, item) for item in Sources(tmp_path) if not item.problem}
    assert content["s.tar/h2.jpg"] == ONE and content["s.tar/d/s.jpg"] == TWO
    with pytest.raises(ValueError, match="is a link: pack the shards again"):
        list(tar_samples(tmp_path / "s.tar"))


def test_a_hard_link_leads_to_what_came_before(tmp_path: Path) -> None:
    link = {"type": tarfile.LNKTYPE, "linkname": "a.jpg"}
    tar_of(tmp_path / "s.tar", [("a.jpg", ONE), ("h.jpg", None, link), ("h.txt", b"h"), ("a.jpg", TWO)])
    assert [bytes_of(tmp_path, item) for item in Sources(tmp_path)] == [ONE, ONE, TWO]


@pytest.mark.parametrize("dialect", ["gnu", "posix"])
def test_sparse_members(tmp_path: Path, dialect: str) -> None:
    inside = tmp_path / "inside"
    inside.mkdir()
    pixels = np.zeros((256, 256, 3), np.uint8)
    pixels[:60], pixels[200:] = (200, 30, 40), (20, 200, 90)
    out = io.BytesIO()
    Image.fromarray(pixels).save(out, "BMP")
    blob = out.getvalue()
    with (inside / "a.bmp").open("wb") as file:
        for place in range(0, len(blob), 4096):
            if blob[place : place + 4096].strip(b"\0"):
                file.seek(place)
                file.write(blob[place : place + 4096])
        file.truncate(len(blob))
    (inside / "a.txt").write_text("sparse")
    (inside / "b.jpg").write_bytes(ONE)
    (inside / "b.txt").write_text("behind it")
    base = tmp_path / "base"
    base.mkdir()
    names = ["a.bmp", "a.txt", "b.jpg", "b.txt"]
    command = ["tar", "--sparse", f"--format={dialect}", "-cf", base / "s.tar", "-C", inside, *names]
    subprocess.run(command, check=True)
    items = list(Sources(base))
    assert [(item.path, item.caption) for item in items] == [("s.tar/a.bmp", "sparse"), ("s.tar/b.jpg", "behind it")]
    if items[0].kind != SPARSE:
        pytest.skip("this file system keeps no holes")
    assert np.array_equal(opened(bytes_of(base, items[0])), pixels) and bytes_of(base, items[1]) == ONE
    with pytest.raises(ValueError, match="is sparse: pack the shards again"):
        list(tar_samples(base / "s.tar"))


def test_nothing_behind_damage_is_lost_in_silence(tmp_path: Path) -> None:
    path = tar_of(tmp_path / "s.tar", [(f"{n}.{e}", d) for n in range(3) for e, d in (("jpg", ONE), ("txt", b"x"))])
    whole = path.read_bytes()
    second = whole.index(b"1.jpg")
    for name, data, message in (
        ("bad header", whole[:second] + b"\xff" * 100 + whole[second + 100 :], "no valid header at byte"),
        ("cut within", whole[: second + 600], "the file is cut off"),
        ("cut between", whole[:second], "without an end mark"),
        ("no end mark", whole[: whole.rindex(b"2.txt") + 1024], "without an end mark"),
        ("gzip", b"\x1f\x8b" + bytes(600), "not a tar but gzip: unpack it first"),
        ("garbage behind", whole + b"x" * 700, "no valid header at byte"),
        ("empty", b"", "not a tar"),
    ):
        path.write_bytes(data)
        items = list(Sources(tmp_path))
        assert items[-1].problem and items[-1].problem[0] == "broken tar" and message in items[-1].problem[1], name
        with path.open("rb") as file, pytest.raises(BrokenTar):
            list(tar_members(file))
    path.write_bytes(whole[:second] + b"\xff" * 100 + whole[second + 100 :])
    assert found_in(tmp_path)[0] == ("s.tar/0.jpg", "x")


def test_archives_put_one_behind_another(tmp_path: Path) -> None:
    one = tar_of(tmp_path / "1", [("a.jpg", ONE), ("a.txt", b"one")]).read_bytes()
    two = tar_of(tmp_path / "2", [("b.jpg", TWO), ("b.txt", b"two")]).read_bytes()
    base = tmp_path / "base"
    base.mkdir()
    (base / "both.tar").write_bytes(one + two)
    items = list(Sources(base))
    assert [(item.path, item.caption) for item in items] == [("both.tar/a.jpg", "one"), ("both.tar/b.jpg", "two")]
    assert bytes_of(base, items[1]) == TWO


def test_a_negative_size_does_not_lead_back_for_ever(tmp_path: Path) -> None:
    path = tar_of(tmp_path / "s.tar", [("a.jpg", ONE), ("b.jpg", TWO)])
    data = bytearray(path.read_bytes())
    start = data.index(b"b.jpg")
    data[start + 124 : start + 136] = b"\xff" * 8 + (-4096).to_bytes(4, "big", signed=True)
    data[start + 148 : start + 156] = b" " * 8
    data[start + 148 : start + 156] = b"%06o\0 " % sum(data[start : start + 512])
    path.write_bytes(data)
    assert list(Sources(tmp_path))[-1].problem is not None


def test_what_is_no_sample_is_counted(tmp_path: Path) -> None:
    members = [
        ("a.jpg", ONE),
        ("a.txt", b"x"),
        ("._a.jpg", b"mac"),
        ("lonely.txt", b"x"),
        ("in.tar", b"t"),
        ("a.npz", b"n"),
    ]
    tar_of(tmp_path / "s.tar", [*members, ("deep.jpg", ONE), ("deep.json", b"[" * 200_000)])
    source = Sources(tmp_path)
    found = {item.path: item.problem and item.problem[0] for item in source}
    assert found == {"s.tar/a.jpg": None, "s.tar/deep.jpg": "caption not readable"}
    counts = source.remarks.counts
    assert (counts[HIDDEN], counts[LONELY_CAPTIONS], counts[OTHER_MEMBERS]) == (1, 1, 2)


def test_plain_shards_with_a_key_twice_are_refused(tmp_path: Path) -> None:
    path = tar_of(tmp_path / "s.tar", [("a.jpg", ONE), ("b.jpg", TWO), ("a.txt", b"one"), ("b.txt", b"two")])
    with pytest.raises(ValueError, match="a comes twice: its members do not stand side by side"):
        list(tar_samples(path))


def test_old_gnu_headers_hold_times_where_posix_has_a_prefix(tmp_path: Path) -> None:
    """`tar --incremental` writes them; tarfile takes the times for a part of the name."""
    path = tar_of(tmp_path / "a.tar", [("d/x.jpg", ONE), ("d/x.txt", b"caption")])
    data = bytearray(path.read_bytes())
    assert data[257:265] == b"ustar  \0"
    data[345:369] = b"15302461437\00015302461437\0"
    data[148:156] = b" " * 8
    data[148:156] = b"%06o\0 " % sum(data[:512])
    path.write_bytes(data)
    (item,) = Sources(tmp_path)
    assert (item.path, item.caption) == ("a.tar/d/x.jpg", "caption")


def test_a_header_that_cannot_be_read_is_said_without_its_bytes(tmp_path: Path) -> None:
    sparse = {"GNU.sparse.major": "1", "GNU.sparse.minor": "0", "GNU.sparse.name": "b.jpg", "GNU.sparse.realsize": "5"}
    members = [("a.jpg", ONE), ("a.txt", b"a"), ("b.jpg", TWO, {"pax_headers": sparse}), ("c.jpg", ONE)]
    tar_of(tmp_path / "a.tar", members, tarfile.PAX_FORMAT)
    first, broken = Sources(tmp_path)
    assert first.caption == "a" and broken.problem is not None and broken.problem[0] == "broken tar"
    assert "a member's header cannot be read, after byte" in broken.problem[1] and "\\x" not in broken.problem[1]
