"""Remote shards: the same samples with a cache of any size, which never outgrows its limit and holds what comes next."""

import contextlib
import errno
import itertools
import multiprocessing
import os
import subprocess
import time
from pathlib import Path

import fsspec
import pytest
import torch

from tests.helpers.data_sets import assert_equal, latent_of, write_set
from tests.helpers.shard_cache import cached, size, wait_for
from train.data.remote_cache import ShardsAhead, shards_in_order
from train.data.sample import BrokenSample
from train.data.shard_dataset import ShardDataset
from train.flow.timestep_sampling import SigmaSampling
from train.loader.indexed_loader import BatchLoader
from train.loader.worker_loader import Reading

SHARDS = 6


@pytest.fixture
def remote(tmp_path: Path, request: pytest.FixtureRequest) -> tuple[str, Path]:
    """The URL of a data set of six shards in fsspec's memory filesystem, and the local original."""
    original = write_set(tmp_path / "original", samples=30, shard_size=5)
    url = f"memory://{request.node.name}"
    fsspec.filesystem("memory").put(str(original), url.removeprefix("memory:/"), recursive=True)
    return url, original


def shard_bytes(original: Path) -> int:
    return max(path.stat().st_size for path in original.glob("*.tar"))


@pytest.mark.parametrize("shards", [0, 2, SHARDS])
def test_the_cache_changes_nothing_but_where_bytes_come_from(remote, tmp_path, shards):
    url, original = remote
    dataset = ShardDataset(url, cache_folder=tmp_path / "cache")
    limit = shards * shard_bytes(original)
    sampling, reading = SigmaSampling(), Reading(caption_dropout=0.2)
    there, here = dataset.order(2, seed=1, window=1), ShardDataset(original).order(2, seed=1, window=1)
    with (
        BatchLoader(dataset, there, sampling, reading, limit) as far,
        BatchLoader(ShardDataset(original), here, sampling, reading) as near,
    ):
        for a, b in itertools.islice(zip(far, near, strict=True), 2 * there.length + 3):
            assert_equal(a, b)
            assert len(cached(dataset)) <= shards
            time.sleep(0.002)
    if shards == SHARDS:
        assert len(cached(dataset)) == SHARDS


def test_what_comes_next_is_copied_and_what_was_used_is_dropped(remote, tmp_path):
    url, original = remote
    dataset = ShardDataset(url, cache_folder=tmp_path / "cache")
    order = dataset.order(1, window=1)
    sequence = shards_in_order(order, dataset.index.shard, 0, order.length)
    assert sorted(sequence) == list(range(SHARDS))
    with ShardsAhead(dataset.reader, order, dataset.index.shard, 0, 2 * shard_bytes(original)) as ahead:
        for position in range(SHARDS - 1):
            place = next(
                i for i in range(order.length) if dataset.index.shard[order.plan(0)[i, 0]] == sequence[position]
            )
            ahead.at(place)
            expected = sorted(f"{shard:06d}.tar" for shard in sequence[position : position + 2])
            wait_for(lambda expected=expected: cached(dataset) == expected)
            data = dataset.folder / expected[0]
            assert data.read_bytes() == (original / expected[0]).read_bytes()


def flip(files, path: str) -> None:
    """One bit of a payload, so that everything can still be decoded."""
    data = bytearray(files.cat_file(path))
    data[700] ^= 1
    files.pipe_file(path, bytes(data))


def test_a_shard_that_comes_wrong_twice_is_broken(remote, tmp_path):
    url, _ = remote
    files = fsspec.filesystem("memory")
    path = f"{url.removeprefix('memory:/')}/000003.tar"
    flip(files, path)
    said: list[str] = []
    dataset = ShardDataset(url, cache_folder=tmp_path / "cache")
    order = dataset.order(1)
    with ShardsAhead(dataset.reader, order, dataset.index.shard, 0, 10**9, said.append):
        wait_for(lambda: len(cached(dataset)) == SHARDS - 1 and said)
    assert "000003.tar, fetched 2 times, is not what the manifest says: it doesn't match the sha256" in said[0]
    assert len(said) == 1
    with pytest.raises(BrokenSample, match=r"000003\.tar doesn't match the manifest's sha256"):
        dataset.read(15)
    assert dataset.read(14).caption == "caption 14 é"
    flip(files, path)  # mended: the next run finds out
    with ShardsAhead(dataset.reader, order, dataset.index.shard, 0, 10**9, said.append):
        wait_for(lambda: len(cached(dataset)) == SHARDS)
        wait_for(lambda: dataset.read(15).key == "000003000000")
    assert len(said) == 1


def test_a_shard_that_comes_wrong_once_is_fetched_again(remote, tmp_path, monkeypatch):
    url, original = remote
    dataset, said = ShardDataset(url, cache_folder=tmp_path / "cache"), list[str]()
    read, wrong = dataset.reader.remote.read, ["000003.tar"]

    def flips(name, start=None, end=None):
        data = read(name, start, end)
        if name in wrong:
            wrong.remove(name)
            data = bytes(1) + data[1:]
        return data

    monkeypatch.setattr(dataset.reader.remote, "read", flips)
    with ShardsAhead(dataset.reader, dataset.order(1), dataset.index.shard, 0, 10**9, said.append):
        wait_for(lambda: len(cached(dataset)) == SHARDS)
    assert not wrong and not said
    assert (dataset.folder / "000003.tar").read_bytes() == (original / "000003.tar").read_bytes()


@pytest.mark.parametrize("damage", ["cut", "flipped", "no mark"])
def test_a_copy_that_was_changed_is_not_read_and_fetched_again(remote, tmp_path, damage):
    url, original = remote
    dataset = ShardDataset(url, cache_folder=tmp_path / "cache")
    arguments = dataset.order(1), dataset.index.shard, 0, 10**9
    with ShardsAhead(dataset.reader, *arguments):
        wait_for(lambda: len(cached(dataset)) == SHARDS)
    copy, whole = dataset.folder / "000003.tar", (original / "000003.tar").read_bytes()
    time.sleep(0.02)
    if damage == "cut":
        os.truncate(copy, 3000)
    elif damage == "flipped":
        copy.write_bytes(whole[:700] + bytes([whole[700] ^ 1]) + whole[701:])
    else:
        dataset.reader.verified_mark(3).unlink()
    again = ShardDataset(url, cache_folder=tmp_path / "cache")
    for number in range(15, 20):
        assert torch.equal(again.read(number).latent, latent_of(number))
    with ShardsAhead(again.reader, *arguments, pytest.fail):
        wait_for(lambda: again.reader.is_verified(3, copy.stat()) and copy.read_bytes() == whole)


def test_a_new_remote_set_under_the_old_name_replaces_the_copies(remote, tmp_path):
    url, _ = remote
    dataset = ShardDataset(url, cache_folder=tmp_path / "cache")
    with ShardsAhead(dataset.reader, dataset.order(1), dataset.index.shard, 0, 10**9):
        wait_for(lambda: len(cached(dataset)) == SHARDS)
    changed = write_set(tmp_path / "changed", samples=8, shard_size=4)
    files = fsspec.filesystem("memory")
    files.rm(url.removeprefix("memory:/"), recursive=True)
    files.put(str(changed), url.removeprefix("memory:/"), recursive=True)
    dataset = ShardDataset(url, cache_folder=tmp_path / "cache")
    assert len(dataset) == 8 and cached(dataset) == []
    assert dataset.read(7).caption == "caption 7 é"


def test_what_is_missing_remotely_is_named(remote, tmp_path):
    with pytest.raises(FileNotFoundError, match=r"memory://nowhere holds no manifest\.json"):
        ShardDataset("memory://nowhere", cache_folder=tmp_path)
    url, _ = remote
    dataset = ShardDataset(url, cache_folder=tmp_path / "cache")
    fsspec.filesystem("memory").rm(f"{url.removeprefix('memory:/')}/000000.tar")
    with pytest.raises(BrokenSample, match=r"000000\.tar"):
        dataset.read(0)


def test_a_full_disk_makes_the_cache_smaller_and_is_said_once(remote, tmp_path, monkeypatch):
    """Room for two of six shards: they are kept, later ones take their place, and all samples are the same."""
    from train.data import remote_cache

    url, original = remote
    dataset, said = ShardDataset(url, cache_folder=tmp_path / "cache"), []
    whole_file = remote_cache.whole_file

    def on_a_small_disk(path):
        if len(cached(dataset)) >= 2:
            raise OSError(errno.ENOSPC, "No space left on device")
        return whole_file(path)

    monkeypatch.setattr(remote_cache, "whole_file", on_a_small_disk)
    order = dataset.order(2, seed=1, window=1)
    with ShardsAhead(dataset.reader, order, dataset.index.shard, 0, 10**9, said.append) as ahead:
        wait_for(lambda: said)
        first = cached(dataset)
        for place in range(order.length):
            ahead.at(place)
            time.sleep(0.002)
        wait_for(lambda: cached(dataset) and cached(dataset) != first)
        assert len(cached(dataset)) <= 2
    assert len(said) == 1 and f"the disk of the cache {dataset.folder} is full: it keeps 4" in said[0]
    for index in range(len(dataset)):
        assert torch.equal(dataset.read(index).latent, ShardDataset(original).read(index).latent)


def test_a_cache_that_cant_hold_the_index_is_named(remote, tmp_path, monkeypatch):
    from train.data import remote_shards

    def full(path, blocks):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(remote_shards, "write_whole", full)
    with pytest.raises(OSError, match=r"data_cache_path: .*cache/\w+ can't be written \(No space left on device\)"):
        ShardDataset(remote[0], cache_folder=tmp_path / "cache")


def test_one_run_at_a_time_fills_a_folder(remote, tmp_path, monkeypatch):
    """And what a killed one left half-copied goes."""
    monkeypatch.setattr("train.data.remote_cache.LOCK_SECONDS", 0.02)
    url, _ = remote
    dataset = ShardDataset(url, cache_folder=tmp_path / "cache")
    left_over = dataset.folder / ".partial-000002.tar.12345"
    left_over.write_bytes(bytes(100))
    said: list[str] = []
    arguments = dataset.reader, dataset.order(1), dataset.index.shard, 0
    with ShardsAhead(*arguments, 10**9):
        wait_for(lambda: len(cached(dataset)) == SHARDS and not left_over.exists())
        with ShardsAhead(*arguments, 0, said.append):  # alone, it would empty the folder
            wait_for(lambda: said)
            assert "another run fills the cache" in said[0] and len(cached(dataset)) == SHARDS
    with ShardsAhead(*arguments, 0, said.append):
        wait_for(lambda: not cached(dataset))
    assert len(said) == 1


def test_the_disk_gets_its_space_back_while_workers_read(remote, tmp_path):
    """Two workers that hold shards open: what is in the folder and what was deleted but is still open stays bounded."""
    url, original = remote
    dataset = ShardDataset(url, cache_folder=tmp_path / "cache")
    order, one = dataset.order(2, seed=1, window=1), shard_bytes(original)
    most = 0
    with BatchLoader(dataset, order, SigmaSampling(), Reading(num_workers=2), 2 * one) as loader:
        for _ in itertools.islice(loader, 6 * order.length):
            copies = [path for path in dataset.folder.glob("*.tar*") if ".verified" not in path.name]
            assert sum(map(size, copies)) <= 2 * one
            most = max(
                most, sum(deleted_but_open(child.pid, dataset.folder) for child in multiprocessing.active_children())
            )
            time.sleep(0.005)
    assert most <= 2 * 2 * one, "each worker holds at most what the cache held when it last opened a shard"


def deleted_but_open(process: int, folder: Path) -> int:
    with contextlib.suppress(FileNotFoundError):
        links = [
            link
            for link in Path(f"/proc/{process}/fd").iterdir()
            if link.readlink().parent == folder and str(link.readlink()).endswith(".tar (deleted)")
        ]
        return sum(map(size, links))
    return 0


@pytest.fixture
def read_only(tmp_path: Path):
    """A function that makes a folder read-only, for root too: a mount."""
    mounted: list[Path] = []

    def make(folder: Path) -> None:
        bind = ["mount", "--bind", str(folder), str(folder)]
        if os.geteuid() != 0 or subprocess.run(bind, capture_output=True).returncode:
            pytest.skip("no permission to mount")
        mounted.append(folder)
        subprocess.run(["mount", "-o", "remount,ro,bind", str(folder)], check=True)

    yield make
    for folder in mounted:
        subprocess.run(["umount", "--lazy", str(folder)], check=True)


def test_a_filled_cache_that_is_read_only_is_read(remote, tmp_path, read_only):
    url, _ = remote
    cache, said = tmp_path / "cache", list[str]()
    dataset = ShardDataset(url, cache_folder=cache)
    order, sampling = dataset.order(2), SigmaSampling()
    with ShardsAhead(dataset.reader, order, dataset.index.shard, 0, 10**9, said.append):
        wait_for(lambda: len(cached(dataset)) == SHARDS)
    (dataset.folder / "000002.tar").unlink()
    read_only(cache)
    with pytest.raises(OSError, match=r"data_cache_path: .* can't be written \(Read-only file system\)"):
        ShardDataset(f"{url}/", cache_folder=cache)  # another address: this one isn't in it
    dataset = ShardDataset(url, cache_folder=cache)
    asked: list[str] = []
    read = dataset.reader.remote.read
    dataset.reader.remote.read = lambda name, *place: (asked.append(name), read(name, *place))[1]
    with BatchLoader(dataset, order, sampling, Reading(say=said.append), 10**9) as loader:
        assert len(list(itertools.islice(loader, order.length))) == order.length
    assert set(asked) == {"000002.tar"} and len(said) == 1
    assert "can't be written (Read-only file system): its shards are read, others' samples remotely" in said[0]
