"""The format: names, deterministic tars, random access, manifest and index, and their errors."""

from __future__ import annotations

import dataclasses
import errno
import json
import multiprocessing
import os
import pickle
import tarfile
from pathlib import Path

import pytest

from data_prep.shard_format import shards
from data_prep.shard_format.shards import (
    Bucket,
    Manifest,
    Shard,
    ShardReader,
    TarShardWriter,
    read_index,
    read_manifest,
)
from files.atomic_files import PARTIAL, remove_abandoned, write_file

MEMBERS = [("jpg", b"picture" * 100), ("json", b"{}"), ("txt", "Käfer".encode())]


def written(folder: Path, count: int = 3) -> Manifest:
    """A set of one tar with `count` samples, its index and its manifest."""
    columns: dict[str, list] = {name: [] for name in shards.INDEX_ROWS.names}
    with TarShardWriter(folder / "000000.tar") as tar:
        for number in range(count):
            key = shards.sample_key(0, number)
            places = tar.add(key, [*MEMBERS[:2], ("txt", f"caption {number}".encode())])
            for name, (offset, size) in zip(("payload", "json", "txt"), places.values(), strict=True):
                columns[f"{name}_offset"].append(offset)
                columns[f"{name}_size"].append(size)
            row = {
                "key": key,
                "path": f"{number}.jpg",
                "shard": 0,
                "bucket": 0,
                "caption_length": 9,
                "prompt_tokens": 0,
            }
            for name, value in row.items():
                columns[name].append(value)
    shards.write_index(folder, columns)
    shard = Shard("000000.tar", count, tar.bytes, tar.sha256)
    manifest = Manifest("jpg", "f" * 64, {"quality": 95}, [Bucket(0, 64, 32, count)], {}, [shard], {"numpy": "2"})
    shards.write_manifest(folder, manifest)
    return manifest


def test_keys() -> None:
    assert shards.sample_key(12, 345) == "000012000345"
    for shard, index in ((-1, 0), (10**6, 0), (0, 10**6)):
        with pytest.raises(ValueError, match="at most 1000000 shards of 1000000 samples"):
            shards.sample_key(shard, index)


def test_a_tar_depends_on_its_members_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("a", "b"):
        with TarShardWriter(tmp_path / name) as tar:
            assert not (tmp_path / name).exists()  # only when it is whole
            places = tar.add("000000000000", MEMBERS)
        monkeypatch.setenv("TZ", "Asia/Tokyo")
        os.umask(os.umask(0o077))
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()
    assert len((tmp_path / "a").read_bytes()) == tar.bytes and tar.bytes % tarfile.RECORDSIZE == 0
    with tarfile.open(tmp_path / "a") as archive:
        for (suffix, data), member in zip(MEMBERS, archive, strict=True):
            assert member.name == f"000000000000.{suffix}" and (member.mtime, member.uid) == (0, 0)
            assert (member.offset_data, member.size) == places[suffix]
            file = archive.extractfile(member)
            assert file is not None and file.read() == data


def test_a_tar_that_failed_leaves_nothing(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError), TarShardWriter(tmp_path / "x.tar") as tar:
        tar.add("000000000000", MEMBERS)
        raise RuntimeError
    assert list(tmp_path.iterdir()) == []


def test_manifest_and_index_come_back(tmp_path: Path) -> None:
    manifest = written(tmp_path)
    assert read_manifest(tmp_path) == manifest and read_manifest(str(tmp_path)).format_version == 1
    index = read_index(tmp_path)
    assert len(index) == 3 and index.key[2] == "000000000002" and index.path[1] == "1.jpg"
    bare = read_index(tmp_path, strings=False)
    assert (bare.payload_offset == index.payload_offset).all() and set(bare.key) == set(bare.path) == {""}


def read_all(reader: ShardReader, places: list[tuple[int, int]], queue: multiprocessing.Queue) -> None:
    queue.put([reader.read(0, offset, size) for offset, size in places])


@pytest.mark.parametrize("method", ["fork", "spawn"])
def test_reader_in_other_processes(tmp_path: Path, method: str) -> None:
    written(tmp_path)
    index, reader = read_index(tmp_path), ShardReader(tmp_path)
    places = list(zip(index.txt_offset.tolist(), index.txt_size.tolist(), strict=True))
    here = [reader.read(0, offset, size) for offset, size in places]
    assert here == [b"caption 0", b"caption 1", b"caption 2"]
    assert pickle.loads(pickle.dumps(reader)).read(0, *places[1]) == b"caption 1"
    if method == "fork":
        child = os.fork()
        if child == 0:
            os._exit(0 if [reader.read(0, *place) for place in places] == here else 1)
        assert os.waitpid(child, 0)[1] == 0
    else:
        context = multiprocessing.get_context(method)
        queue = context.Queue()
        process = context.Process(target=read_all, args=(reader, places, queue))
        process.start()
        assert queue.get(timeout=60) == here
        process.join()
    assert reader.read(0, *places[0]) == b"caption 0"
    reader.close()


def test_clear_errors(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"no such folder\. Make one with data_prep/make_shards"):
        read_manifest(tmp_path / "none")
    with pytest.raises(FileNotFoundError, match=r"no manifest\.json in it"):
        read_manifest(tmp_path)
    with pytest.raises(FileNotFoundError, match=r"has no index\.parquet"):
        read_index(tmp_path)
    manifest = written(tmp_path)
    reader = ShardReader(tmp_path)
    with pytest.raises(ValueError, match=r"000000\.tar ends before byte"):
        reader.read(0, 0, 10**6)
    (tmp_path / "000000.tar").unlink()
    with pytest.raises(FileNotFoundError, match="is named in the manifest but missing"):
        ShardReader(tmp_path).read(0, 0, 1)
    path = tmp_path / "manifest.json"
    path.write_text(json.dumps(dataclasses.asdict(manifest) | {"format_version": 9}))
    with pytest.raises(ValueError, match="has format version 9, this code reads 1"):
        read_manifest(tmp_path)
    for damaged in ("{", "{}", json.dumps(dataclasses.asdict(manifest) | {"color": 1})):
        path.write_text(damaged)
        with pytest.raises(ValueError, match="is damaged"):
            read_manifest(tmp_path)


@pytest.mark.parametrize("name", ["../000000.tar", "/etc/passwd", "a/b.tar", "", "a\0.tar", 7])
def test_a_manifest_cannot_name_a_shard_outside_of_its_folder(tmp_path: Path, name: object) -> None:
    fields = dataclasses.asdict(written(tmp_path))
    fields["shards"][0]["name"] = name
    (tmp_path / "manifest.json").write_text(json.dumps(fields))
    with pytest.raises(ValueError, match=r"manifest\.json is damaged or not to be trusted"):
        read_manifest(tmp_path)


def test_files_of_dead_processes_are_removed(tmp_path: Path) -> None:
    import socket

    child = os.fork()
    if child == 0:
        os._exit(0)
    os.waitpid(child, 0)
    host = socket.gethostname()
    names = {f"{PARTIAL}000000.tar.{host}.{child}": False, f"{PARTIAL}000001.tar.{host}.1": True}
    names |= {f"{PARTIAL}000002.tar.elsewhere.{child}": True, "000003.tar": True}
    for name in names:
        write_file(tmp_path / name, b"")
    remove_abandoned(tmp_path)
    assert {name: (tmp_path / name).exists() for name in names} == names


def test_a_disk_that_is_full_at_the_end_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(_: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(shards.os, "fsync", full)
    with pytest.raises(OSError, match="No space left"), shards.TarShardWriter(tmp_path / "0.tar") as tar:
        tar.add("a", [("txt", b"text")])
    assert not list(tmp_path.iterdir())
