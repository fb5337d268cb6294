"""A folder of shards as it lies on the disk: complete, with manifest and index; which of its samples are held out."""

import hashlib
from collections.abc import Callable
from pathlib import Path

import numpy as np
from filelock import FileLock

from data_prep.shard_format.shards import EMPTY_PROMPT, INDEX, MANIFEST, Manifest, ShardIndex, read_index, read_manifest


def open_folder(folder: Path, say: Callable[[str], None], local: bool = True) -> tuple[Manifest, ShardIndex]:
    """Manifest and index of a folder; plain WebDataset shards get theirs by scanning, once.

    `local`: the shards themselves are in it too. Raises FileNotFoundError naming what is missing, ValueError for what is
    damaged or can't be indexed, PermissionError where an index can't be written.
    """
    if not folder.is_dir():
        raise FileNotFoundError(f"no folder at {folder}")
    if not (folder / MANIFEST).is_file():  # first: a scan by another rank writes it last
        scan(folder, say)
    if not (folder / INDEX).is_file():
        raise lost(folder, INDEX, MANIFEST)
    manifest = read_manifest(folder)
    missing = [shard.name for shard in manifest.shards if local and not (folder / shard.name).is_file()]
    if missing:
        raise FileNotFoundError(
            f"{folder} lacks {len(missing)} of {len(manifest.shards)} shards ({', '.join(missing[:3])} …): copy them back"
        )
    return manifest, read_index(folder, strings=False)


def scan(folder: Path, say: Callable[[str], None]) -> None:
    """Index plain shards; one rank does it, the others wait."""
    from data_prep.shard_format.scan_tars import build_index

    if (folder / EMPTY_PROMPT).is_file():  # of encode_shards.py, whose manifest tells what a scan can't know
        raise lost(folder, MANIFEST, EMPTY_PROMPT)
    with FileLock(folder / ".index.lock"):  # a file that is written to: NFS locks no others
        if not (folder / MANIFEST).is_file():
            say(f"{folder} has no index: scanning its shards once")
            build_index(folder)


def lost(folder: Path, name: str, other: str) -> FileNotFoundError:
    return FileNotFoundError(f"{folder} has no {name}, but {other}: copy it back, or run the script that wrote it")


def held_out(folder: Path, count: int) -> np.ndarray:
    """Sorted indices of the `count` samples whose source path (key, where there is none) has the smallest sha256."""
    if count == 0:
        return np.array([], dtype=np.int64)
    index = read_index(folder)
    names = np.where(index.path.astype(bool), index.path, index.key)
    digests = [hashlib.sha256(str(name).encode()).digest() for name in names]
    return np.sort(np.array(sorted(range(len(digests)), key=digests.__getitem__)[:count], dtype=np.int64))
