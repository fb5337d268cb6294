"""One shard of the plan to its tar, its rows and its statistics; the statistics are written last and commit it."""

from __future__ import annotations

import json
import os
import tarfile
from collections import Counter
from pathlib import Path
from typing import Any

from data_prep.images.masks import StoredMask
from data_prep.images.skip_reasons import BadImage
from data_prep.packing.plan import Row, file_sha256
from data_prep.packing.workers import Job, Workers, store
from data_prep.shard_format.shards import (
    CAPTION_ROWS,
    MASK_ROWS,
    MASK_SUFFIX,
    NO_MASK,
    PAIR_ROWS,
    SHARD_ROWS,
    WEIGHT_ROWS,
    TarShardWriter,
    bucket_name,
    rows_name,
    sample_key,
    source_suffix,
    stats_name,
    tar_name,
    with_more,
    write_rows,
)
from data_prep.sources.regular_files import read_regular
from files.atomic_files import json_bytes, write_file

STORE_CHUNK = 4  # images a task: small, because a shard ends when its last task does
WARNED = "warned"  # among the first inputs of each reason: of the samples whose decoder warned
BLACK, TURNED = "black mask", "turned mask"  # likewise
_MEMBERS = ("payload", "json", "txt")


def read_stats(folder: Path, shard: int, fingerprint: str) -> dict[str, Any] | None:
    """Statistics of a committed shard; None when it was not finished, belongs to another plan or is damaged.

    Its files must have their sizes, and where one was touched after the commit, their sha256.
    """
    stats = stats_of(folder, shard)
    if stats is None or stats["fingerprint"] != fingerprint:
        return None
    committed = (folder / stats_name(shard)).stat().st_ctime_ns
    files = [(rows_name(shard), stats.get("rows_sha256"))]
    if stats["samples"]:
        files.append((tar_name(shard), stats["sha256"]))
    for name, sha256 in files:
        path = folder / name
        if not path.is_file() or (name.endswith(".tar") and path.stat().st_size != stats["bytes"]):
            return None
        if name.endswith(".parquet") and not _is_whole_parquet(path):
            return None
        status = path.stat()
        touched = max(status.st_ctime_ns, status.st_mtime_ns) > committed
        if touched and sha256 and file_sha256(path) != sha256:
            return None
    return stats


def _is_whole_parquet(path: Path) -> bool:
    """Whether a parquet file has its marks at both ends: a copy that was cut off has newer statistics all the same."""
    with open(path, "rb") as file:
        start = file.read(4)
        return file.seek(0, os.SEEK_END) >= 12 and file.seek(-4, os.SEEK_END) >= 0 and start == file.read() == b"PAR1"


def stats_of(folder: Path, shard: int) -> dict[str, Any] | None:
    """NNNNNN_stats.json, of whichever plan; None when there is none or it is damaged."""
    try:
        stats = json.loads(read_regular(folder / stats_name(shard)))
        right = all(isinstance(stats[name], kind) for name, kind in _STATS.items())
        return stats if right else None
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return None


_STATS = {
    "fingerprint": str,
    "samples": int,
    "failed": int,
    "bytes": int,
    "sha256": str,
    "reasons": dict,
    "buckets": dict,
}


def pack_shard(
    folder: Path, shard: int, rows: list[Row], workers: Workers, job: Job, fingerprint: str, progress: Any
) -> dict[str, Any]:
    """Store every usable image of one shard and commit it; return its statistics.

    `progress` has update(n) and failed(n). The bytes written depend on the plan and the images alone. A shard of which
    no image could be used has rows and statistics, but no tar. Raises OSError when the disk is full or not writable.
    """
    (folder / stats_name(shard)).unlink(missing_ok=True)
    payload = job.options.format
    everything = with_more(SHARD_ROWS, PAIR_ROWS, CAPTION_ROWS, WEIGHT_ROWS, MASK_ROWS)
    columns: dict[str, list[Any]] = {name: [] for name in everything.names}
    counts: Counter[str] = Counter(samples=0, filtered=0, failed=0, copied=0, animated=0, empty_captions=0, warned=0)
    reasons: Counter[str] = Counter()
    first: dict[str, str] = {}
    buckets: Counter[str] = Counter()
    results = workers.map(store, job, (row.item for row in rows if row.status == "ok"), STORE_CHUNK)
    with TarShardWriter(folder / tar_name(shard)) as tar:
        for index, row in enumerate(rows):
            record = _blank(sample_key(shard, index), row)
            if row.status == "ok":
                result = next(results)
                if isinstance(result, BadImage):
                    record |= {"status": result.status, "reason": result.reason, "detail": result.detail}
                else:
                    stored, sha256 = result
                    fields = _sample_fields(record["key"], row, stored, sha256)
                    text = (row.item.caption or "").encode()
                    body = json.dumps(fields, ensure_ascii=False, separators=(",", ":")).encode()
                    members = [(payload, stored.data), ("json", body), ("txt", text)]
                    members += [] if stored.mask is None else [(MASK_SUFFIX, stored.mask.data)]
                    members += [(f"{source_suffix(i)}.{payload}", each.data) for i, each in enumerate(stored.sources)]
                    places = list(tar.add(record["key"], members).values())
                    for member in _MEMBERS if stored.mask is None else (*_MEMBERS, "mask"):
                        offset, size = places.pop(0)
                        record |= {f"{member}_offset": offset, f"{member}_size": size}
                    place = stored.placement
                    sources = [(each.placement.width, each.placement.height) for each in stored.sources]
                    record |= _of_pair(sources, stored, places)
                    record |= {name: getattr(place, name) for name in _PLACEMENT}
                    record |= {"original_width": stored.original_width, "original_height": stored.original_height}
                    record |= {"copied": stored.copied, "frames": stored.frames, "sha256": sha256}
                    record["detail"] = "; ".join([*stored.warnings, *(w for s in stored.sources for w in s.warnings)])
                    buckets[bucket_name(place.width, place.height, sources)] += 1
                    counts.update(copied=stored.copied, animated=stored.frames > 1, empty_captions=not text)
                    counts["warned"] += bool(record["detail"])
                    if row.item.more_captions:
                        counts["several_captions"] += 1
                    if row.item.weight != 1:
                        counts["weighted"] += 1
                    if stored.mask is not None:
                        record |= {"mask_share": stored.mask.share, "mask_sha256": stored.mask.sha256}
                        _count_mask(counts, first, row, stored.mask)
                    if sources:
                        counts["pairs"] += 1
                        counts["reshaped"] += _is_reshaped(stored)
            counts["samples" if record["status"] == "ok" else record["status"]] += 1
            if record["status"] != "ok":
                why = f"{record['status']}: {record['reason']}"
                reasons[why] += 1
                first.setdefault(why, record["path"] + (f" ({record['detail']})" if record["detail"] else ""))
            elif record["detail"]:
                first.setdefault(WARNED, f"{record['path']} ({record['detail']})")
            for name, values in columns.items():
                values.append(record[name])
            progress.update(1)
            progress.failed(counts["failed"])
    if not counts["samples"]:
        tar.path.unlink()
    paired, several = (any(getattr(row.item, name) for row in rows) for name in ("sources", "more_captions"))
    weighted = any(row.item.weight != 1 for row in rows if row.status == "ok")
    optional = [*[PAIR_ROWS] * paired, *[CAPTION_ROWS] * several, *[WEIGHT_ROWS] * weighted]
    optional += [MASK_ROWS] * bool(counts["masked"])
    write_rows(folder / rows_name(shard), columns, with_more(SHARD_ROWS, *optional))
    stats = {
        "fingerprint": fingerprint,
        "inputs": len(rows),
        **counts,
        "bytes": tar.bytes if counts["samples"] else 0,
        "sha256": tar.sha256 if counts["samples"] else "",
        "rows_sha256": file_sha256(folder / rows_name(shard)),
        "reasons": dict(reasons),
        "first": first,
        "buckets": dict(buckets),
    }
    write_file(folder / stats_name(shard), json_bytes(stats))
    return stats


_PLACEMENT = ("width", "height", "crop_left", "crop_top", "crop_width", "crop_height")


def _blank(key: str, row: Row) -> dict[str, Any]:
    """The record of an input of which nothing was stored."""
    record: dict[str, Any] = dict.fromkeys(SHARD_ROWS.names, -1)
    record |= {"key": key, "path": row.item.path, "caption": row.item.caption, "sha256": ""}
    record |= {"status": row.status, "reason": row.reason, "detail": row.detail, "copied": False, "frames": 0}
    record |= {"caption_length": len(row.item.caption or ""), "prompt_tokens": 0}
    captions = [row.item.caption or "", *row.item.more_captions]
    record |= {"captions": len(captions), "longest_caption": max(map(len, captions)), "weight": row.item.weight}
    return record | dict.fromkeys(PAIR_ROWS.names, 0) | {"sources": "", "source_sha256": ""} | NO_MASK


def _of_pair(sources: list[tuple[int, int]], stored: Any, places: list[tuple[int, int]]) -> dict[str, Any]:
    """What the record of a pair has besides; `places` of its source members, each behind its header."""
    if not sources:
        return {}
    start, end = places[0][0] - tarfile.BLOCKSIZE, places[-1][0] + places[-1][1]
    return {
        "sources": bucket_name(*sources[0], sources[1:]),
        "source_sha256": ",".join(each.sha256 for each in stored.sources),
        "sources_offset": start,
        "sources_size": end - start,
    }


def _count_mask(counts: Counter[str], first: dict[str, str], row: Row, mask: StoredMask) -> None:
    counts["masked"] += 1
    if mask.share == 0:
        counts["black_masks"] += 1
        first.setdefault(BLACK, row.item.path)
    if mask.turned:
        counts["turned_masks"] += 1
        first.setdefault(TURNED, row.item.path)


def _is_reshaped(stored: Any) -> bool:
    """Whether no source image has the target's size in the shard: inference takes the target's size from one of them."""
    target = stored.placement.width, stored.placement.height
    return all((each.placement.width, each.placement.height) != target for each in stored.sources)


def _sample_fields(key: str, row: Row, stored: Any, sha256: str) -> dict[str, Any]:
    """The json member. sha256 is of the source's bytes, the crop box in the source's upright pixels."""
    place = stored.placement
    fields = {
        "key": key,
        "path": row.item.path,
        "caption": row.item.caption or "",
        "width": place.width,
        "height": place.height,
        "original_width": stored.original_width,
        "original_height": stored.original_height,
        "sha256": sha256,
        "bucket": bucket_name(place.width, place.height),
        "crop": [place.crop_left, place.crop_top, place.crop_width, place.crop_height],
    }
    if row.item.more_captions:
        fields["captions"] = [row.item.caption, *row.item.more_captions]
    if row.item.weight != 1:
        fields["weight"] = row.item.weight
    if stored.mask is not None:
        path = row.item.mask.path if row.item.mask is not None else "the alpha channel"
        fields["mask"] = {"path": path, "sha256": stored.mask.sha256}
    if stored.sources:
        fields["sources"] = [
            {
                "path": partner.path,
                "width": source.placement.width,
                "height": source.placement.height,
                "original_width": source.original_width,
                "original_height": source.original_height,
                "sha256": source.sha256,
            }
            for partner, source in zip(row.item.sources, stored.sources, strict=True)
        ]
    return fields
