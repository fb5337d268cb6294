"""Shards that nobody indexed (img2dataset's, say): index.parquet and manifest.json by scanning the tars once."""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from data_prep.shard_format.shards import (
    CAPTION_ROWS,
    INDEX_ROWS,
    MASK_INDEX_ROWS,
    MASK_SUFFIX,
    SIZES,
    Bucket,
    Manifest,
    Shard,
    ShardReader,
    bucket_name,
    write_index,
    write_manifest,
)
from data_prep.shard_format.tar_members import BrokenTar, readable, tar_members
from files.atomic_files import json_bytes, write_file
from files.shown import shown

SUFFIXES = {"jpg": "jpg", "jpeg": "jpg", "png": "png"}  # of the payload -> Manifest.payload
SIDES_OF = 16  # pixels: VAE's 8 times the transformer's patches of 2


@dataclass(frozen=True)
class Member:
    """One file of a tar: where its content begins, and how many bytes it has."""

    suffix: str
    offset: int
    size: int


def tar_samples(path: Path) -> Iterator[tuple[str, list[Member]]]:
    """Yield (key, members) of one tar, as webdataset groups them: adjacent names that agree up to their first dot.

    Reads headers only. Raises ValueError when the file is no whole tar, holds members that cannot be read in place (links
    and sparse ones), or a key twice, of which webdataset would make one sample or two halves.
    """
    group: list[Member] = []
    key = None
    keys: set[str] = set()
    again = "pack the shards again with data_prep/make_shards.py"
    try:
        with path.open("rb") as file:
            for member in tar_members(file):
                if member.isdir():
                    continue
                if not member.isreg() or member.issparse():
                    kind = (
                        "sparse" if member.issparse() else "a link" if member.islnk() or member.issym() else "no file"
                    )
                    raise ValueError(f"{shown(path)}: member {shown(readable(member.name))} is {kind}: {again}")
                folder, slash, name = member.name.rpartition("/")
                stem, _, suffix = name.partition(".")
                if folder + slash + stem != key:
                    if key is not None:
                        yield key, group
                    key, group = folder + slash + stem, []
                    if key in keys:
                        what = "its members do not stand side by side, or two samples have one name"
                        raise ValueError(f"{shown(path)}: {shown(readable(key))} comes twice: {what}: {again}")
                    keys.add(key)
                group.append(Member(suffix.lower(), member.offset_data, member.size))
    except BrokenTar as error:
        raise ValueError(f"{shown(path)} is not a whole tar: {error}") from None
    if key is not None:
        yield key, group


def build_index(folder: str | Path) -> Manifest:
    """Write index, sizes and manifest of a folder of tars that has none; return the manifest.

    A sample without an image is left out. Raises FileNotFoundError without tars, PermissionError (from the system)
    where the folder cannot be written, and ValueError for images of mixed formats, for a size of which a side isn't a
    multiple of 16, and for what cannot be read.
    """
    folder = Path(folder)
    paths = sorted(folder.glob("*.tar"))
    if not paths:
        raise FileNotFoundError(f"{folder} holds no *.tar: make shards with data_prep/make_shards.py")
    columns: dict[str, list[Any]] = {name: [] for name in INDEX_ROWS.names}
    formats, sizes = Counter[str](), list[tuple[int, int]]()
    several: list[tuple[int, int]] = []  # captions of each sample, characters of the longest
    masks: list[tuple[int, int, float]] = []  # of each sample the mask's columns
    shards: list[Shard] = []
    for path in paths:
        draft = Manifest("", "", {}, [], {}, [*shards, Shard(path.name, 0, 0, "")], {})
        reader, position, before = ShardReader(folder, draft), len(shards), len(sizes)
        for key, members in tar_samples(path):
            named = {member.suffix: member for member in members}
            suffix = next((suffix for suffix in named if suffix in SUFFIXES), None)
            if suffix is None:
                continue
            record = _record(reader, position, named.get("json"), path, key)
            formats[SUFFIXES[suffix]] += 1
            sizes.append(_size(reader.read(position, named[suffix].offset, named[suffix].size), path, key))
            text = named.get("txt", named.get("caption"))
            caption = reader.read(position, text.offset, text.size) if text else b""
            places = {"payload": named[suffix], "json": named.get("json"), "txt": text}
            for name, member in places.items():
                columns[f"{name}_offset"].append(member.offset if member else 0)
                columns[f"{name}_size"].append(member.size if member else 0)
            masks.append(_mask(reader, position, named.get(MASK_SUFFIX), sizes[-1]))
            columns["key"].append(key)
            columns["path"].append(str(record.get("path") or record.get("url") or f"{path.name}/{key}.{suffix}"))
            columns["shard"].append(position)
            columns["caption_length"].append(len(caption.decode("utf-8", "replace")))
            several.append(_several(record, caption.decode("utf-8", "replace")))
            columns["prompt_tokens"].append(0)
        reader.close()
        if len(sizes) > before:
            shards.append(Shard(path.name, len(sizes) - before, path.stat().st_size, _sha256(path)))
    if not sizes:
        raise ValueError(f"{folder}: no sample of {len(paths)} tars has an image (.jpg, .jpeg or .png)")
    if any(count > 1 for count, _ in several):
        columns |= dict(zip(CAPTION_ROWS.names, zip(*several, strict=True), strict=True))
    if any(share >= 0 for *_, share in masks):
        columns |= dict(zip(MASK_INDEX_ROWS.names, zip(*masks, strict=True), strict=True))
    if len(formats) > 1:
        counts = ", ".join(f"{count} {name}" for name, count in formats.items())
        raise ValueError(f"{folder} mixes image formats ({counts}): pack it again with data_prep/make_shards.py")
    return _write(folder, columns, sizes, shards, next(iter(formats)))


def _write(
    folder: Path, columns: dict[str, list[Any]], sizes: list[tuple[int, int]], shards: list[Shard], payload: str
) -> Manifest:
    counts = Counter(sizes)
    buckets = [Bucket(id, *size, counts[size]) for id, size in enumerate(sorted(counts))]
    ids = {(bucket.width, bucket.height): bucket.id for bucket in buckets}
    columns["bucket"] = [ids[size] for size in sizes]
    write_index(folder, columns)
    write_file(folder / SIZES, json_bytes({shard.name: shard.samples for shard in shards}))
    totals = {"samples": len(sizes), "bytes": sum(shard.bytes for shard in shards)}
    if several := sum(count > 1 for count in columns.get("captions", ())):
        totals["several_captions"] = several
    if masked := sum(share >= 0 for share in columns.get("mask_share", ())):
        totals["masked"] = masked
    fingerprint = hashlib.sha256(json_bytes([shard.sha256 for shard in shards])).hexdigest()
    manifest = Manifest(payload, fingerprint, {"indexed_by": "scan"}, buckets, totals, shards, {})
    write_manifest(folder, manifest)
    return manifest


def _record(reader: ShardReader, shard: int, member: Member | None, path: Path, key: str) -> dict[str, Any]:
    if member is None:
        return {}
    try:
        record = json.loads(reader.read(shard, member.offset, member.size))
    except ValueError as error:
        raise ValueError(f"{path.name}: {shown(key)}.json is not valid JSON: {error}") from None
    return record if isinstance(record, dict) else {}


def _several(record: dict[str, Any], caption: str) -> tuple[int, int]:
    """How many captions a sample of make_shards.py has, and the characters of the longest; one where another made it."""
    captions = record.get("captions")
    ours = isinstance(captions, list) and all(isinstance(text, str) for text in captions) and captions[:1] == [caption]
    return (len(captions), max(map(len, captions))) if ours and captions else (1, len(caption))


def _size(data: bytes, path: Path, key: str) -> tuple[int, int]:
    from data_prep.images.header import ImageOptions, read_size
    from data_prep.images.skip_reasons import BadImage

    try:
        width, height = read_size(data, ImageOptions())
    except BadImage as error:
        raise ValueError(
            f"{path.name}: image of {shown(key)}: {error}: pack again with data_prep/make_shards.py"
        ) from None
    if width % SIDES_OF or height % SIDES_OF:
        name = bucket_name(width, height)
        raise ValueError(
            f"{path.name}: image of {shown(key)} is {name}, sides must be multiples of {SIDES_OF}:"
            f" pack the shards again (data_prep/make_shards.py --dataset_base_path {path.parent})"
        )
    return width, height


def _mask(reader: ShardReader, shard: int, member: Member | None, size: tuple[int, int]) -> tuple[int, int, float]:
    """Offset, size and mean of a sample's mask (MASK_INDEX_ROWS); a member that isn't one of ours is as if not there."""
    from data_prep.images.stored_pixels import decode_mask, latent_mask, mask_share

    if member is not None:
        try:
            mask = decode_mask(reader.read(shard, member.offset, member.size), *size)
            return member.offset, member.size, mask_share(latent_mask(mask))
        except ValueError:
            pass
    return 0, 0, -1.0


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
