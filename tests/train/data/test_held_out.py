"""A folder of shards: what it lacks, and plain shards that get their index by scanning."""

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from data_prep.shard_format.scan_tars import build_index
from data_prep.shard_format.shards import INDEX, MANIFEST
from tests.helpers.data_sets import SIZES, write_set
from train.data import shard_dataset as data_folder
from train.data.shard_dataset import ShardDataset


def test_plain_webdataset_shards_are_indexed_once(tmp_path):
    folder = write_set(tmp_path / "plain", payload="png")
    for name in (INDEX, MANIFEST):
        (folder / name).unlink()
    said: list[str] = []
    for _ in range(2):
        dataset = ShardDataset(folder, say=said.append)
    assert len(said) == 1 and "has no index" in said[0]
    assert [dataset.read(i).caption for i in range(12)] == [f"caption {i} é" for i in range(12)]
    assert sorted(dataset.size(i) for i in (0, 1)) == sorted(SIZES)


@pytest.mark.parametrize(
    "lost,message",
    [
        ("index.parquet", r"has no index\.parquet, but manifest\.json"),
        ("manifest.json", r"has no manifest\.json, but empty_prompt\.safetensors"),
        ("000001.tar", r"lacks 1 of 3 shards \(000001\.tar …\)"),
    ],
)
def test_what_a_folder_lacks_is_named_at_once(tmp_path, lost, message):
    folder = write_set(tmp_path / "encoded")
    (folder / lost).unlink()
    with pytest.raises(FileNotFoundError, match=message):
        ShardDataset(folder)
    assert sorted(path.name for path in folder.iterdir() if path.name == lost) == []


def test_plain_shards_are_scanned_once_by_whichever_rank_comes_first(tmp_path):
    folder = write_set(tmp_path / "images", payload="png")
    for name in (INDEX, MANIFEST):
        (folder / name).unlink()
    said: list[str] = []
    with ThreadPoolExecutor(3) as ranks:  # a lock of its own for each: between threads it holds as between processes
        datasets = list(ranks.map(lambda _: ShardDataset(folder, say=said.append), range(3)))
    assert len(said) == 1
    assert [dataset.read(7).caption for dataset in datasets] == ["caption 7 é"] * 3


def test_a_scan_that_another_rank_ends_meanwhile_is_no_error(tmp_path, monkeypatch):
    """Between this rank's look at the folder and its scan, another rank has written index and manifest."""
    folder = write_set(tmp_path / "images", payload="png")
    for name in (INDEX, MANIFEST):
        (folder / name).unlink()
    scan = data_folder.scan

    def late(folder: Path, say: Callable[[str], None]) -> None:
        build_index(folder)
        scan(folder, say)

    monkeypatch.setattr(data_folder, "scan", late)
    said: list[str] = []
    assert ShardDataset(folder, say=said.append).read(7).caption == "caption 7 é" and said == []
