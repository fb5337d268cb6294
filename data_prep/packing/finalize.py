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
    CAPTION_ROWS,
    INDEX,
    MASK_INDEX_ROWS,
    NO_MASK,
    PAIR_INDEX_ROWS,
    SIZES,
    WEIGHT_ROWS,
    Bucket,
    Manifest,
    Shard,
    bucket_name,
    index_schema,
    rows_name,
    sizes_of,
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
    names = sorted(counts, key=sizes_of)
    sizes = [sizes_of(name) for name in names]
    buckets = [Bucket(id, *size, counts[names[id]], tuple(others)) for id, (size, *others) in enumerate(sizes)]
    ids = {name: id for id, name in enumerate(names)}
    paired = any(bucket.sources for bucket in buckets)
    kinds = {"several_captions": CAPTION_ROWS, "weighted": WEIGHT_ROWS, "masked": MASK_INDEX_ROWS}
    used = [rows for name, rows in kinds.items() if any(stats[number].get(name) for number in numbers)]
    variants = (encoding or {}).get("captions", {}).get("variants", 1)
    optional = [*[PAIR_INDEX_ROWS] * paired, *used]
    schema = index_schema([field.name for each in optional for field in each], variants)
    write_row_groups(folder / INDEX, _index_batches(folder, numbers, ids, schema.names), schema)
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


def _totals(stats: dict[int, dict[str, Any]]) -> dict[str, Any]:
    """Sums of every number in the shards' statistics, and of their reasons by name."""
    numbers: Counter[str] = Counter()
    reasons: Counter[str] = Counter()
    for shard in stats.values():
        numbers.update({name: value for name, value in shard.items() if isinstance(value, int)})
        reasons.update(shard.get("reasons", {}))
    return {**numbers, "reasons": dict(reasons)}


def _index_batches(folder: Path, numbers: list[int], ids: dict[str, int], names: list[str]) -> Iterator[dict[str, Any]]:
    for position, number in enumerate(numbers):
        path = folder / rows_name(number)
        there = set(pq.read_schema(path).names)  # a shard without pairs has no columns of theirs
        wanted = [name for name in names if name not in ("shard", "bucket") and name in there]
        extra = ["status", "width", "height", *({"sources"} & there)]
        table = pq.read_table(path, columns=[*wanted, *extra])
        table = table.filter(np.asarray(table["status"].to_numpy() == "ok"))
        sources = table["sources"].to_pylist() if "sources" in there else [""] * len(table)
        sizes = zip(table["width"].to_pylist(), table["height"].to_pylist(), sources, strict=True)
        absent = {"weight": 1.0} | NO_MASK
        columns: dict[str, Any] = {name: np.full(len(table), absent.get(name, 0)) for name in names}
        columns |= {name: table[name].combine_chunks() for name in wanted}
        columns["shard"] = np.full(len(table), position, np.int32)
        columns["bucket"] = [ids[bucket_name(width, height, sizes_of(others))] for width, height, others in sizes]
        yield columns
