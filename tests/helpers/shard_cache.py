"""What lies in the cache of a remote data set."""

import time
from pathlib import Path

from train.data.shard_dataset import ShardDataset


def cached(dataset: ShardDataset) -> list[str]:
    return sorted(path.name for path in dataset.folder.glob("*.tar"))


def wait_for(condition) -> None:
    end = time.time() + 10
    while not condition():
        assert time.time() < end, "waited in vain"
        time.sleep(0.005)


def size(path: Path) -> int:
    try:
        return path.stat().st_size
    except FileNotFoundError:
        return 0
