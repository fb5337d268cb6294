"""Committed shards to a finished data set: index.parquet, sizes.json, manifest.json."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq

from data_prep.shard_format.row_groups import write_row_groups
from data_prep.shard_format.shards import (
    INDEX,
    INDEX_ROWS,
    SIZES,
    Bucket,
    Manifest,
    Shard,
    bucket_name,
    rows_name,
    tar_name,
    write_manifest,
)
from files.atomic_files import PARTIAL, json_bytes, write_file


def finalize(
    folder: Path,
    stats: dict[int, dict[str, Any]],
    *,
    payload: str,
    fingerprint: str,
    options: dict[str, Any],
    versions: dict[str, str],
    encoding: dict[str, Any] | None = None,
    remarks: dict[str, Any] | None = None,
) -> Manifest:
    """Write index, sizes and manifest of a set whose shards are all committed; return the manifest.

    `remarks` go into the manifest's totals as they are: what the sources held that is no input.
    `stats` maps each shard's number to its statistics: counts, bytes, sha256, and samples by bucket name. Shards
    without samples are left out of the manifest. Several processes may do this at the same time: they write the same.
    """
    numbers = [number for number in sorted(stats) if stats[number]["samples"]]
    counts: Counter[str] = Counter()
    for number in numbers:
        counts.update(stats[number]["buckets"])
    sizes = sorted(_size(name) for name in counts)
    buckets = [Bucket(id, *size, counts[bucket_name(*size)]) for id, size in enumerate(sizes)]
    ids = {size: id for id, size in enumerate(sizes)}
    write_row_groups(folder / INDEX, _index_batches(folder, numbers, ids), INDEX_ROWS)
    shards = [
        Shard(tar_name(number), *(stats[number][name] for name in ("samples", "bytes", "sha256"))) for number in numbers
    ]
    write_file(folder / SIZES, json_bytes({shard.name: shard.samples for shard in shards}))
    manifest = Manifest(
        payload, fingerprint, options, buckets, _totals(stats) | (remarks or {}), shards, versions, encoding
    )
    write_manifest(folder, manifest)
    for partial in folder.glob(f"{PARTIAL}[0-9]*"):  # of killed processes on other hosts: all shards are committed
        partial.unlink(missing_ok=True)
    return manifest


def _size(bucket: str) -> tuple[int, int]:
    width, height = bucket.split("x")
    return int(width), int(height)


def _totals(stats: dict[int, dict[str, Any]]) -> dict[str, Any]:
    """Sums of every number in the shards' statistics, and of their reasons by name."""
    numbers: Counter[str] = Counter()
    reasons: Counter[str] = Counter()
    for shard in stats.values():
        numbers.update({name: value for name, value in shard.items() if isinstance(value, int)})
        reasons.update(shard.get("reasons", {}))
    return {**numbers, "reasons": dict(reasons)}


def _index_batches(folder: Path, numbers: list[int], ids: dict[tuple[int, int], int]) -> Iterator[dict[str, Any]]:
    wanted = [name for name in INDEX_ROWS.names if name not in ("shard", "bucket")]
    for position, number in enumerate(numbers):
        table = pq.read_table(folder / rows_name(number), columns=[*wanted, "status", "width", "height"])
        table = table.filter(np.asarray(table["status"].to_numpy() == "ok"))
        sizes = zip(table["width"].to_pylist(), table["height"].to_pylist(), strict=True)
        columns: dict[str, Any] = {name: table[name].combine_chunks() for name in wanted}
        columns["shard"] = np.full(len(table), position, np.int32)
        columns["bucket"] = [ids[size] for size in sizes]
        yield columns
