"""What makes a data set whole: hashes, members, their order, index against tar, and samples that can be decoded."""

from __future__ import annotations

import functools
import hashlib
import json
from pathlib import Path
from typing import Any

import numpy as np

from data_prep.images.stored_pixels import decode_stored
from data_prep.shard_format.scan_tars import Member, tar_samples
from data_prep.shard_format.shards import EMPTY_PROMPT, INDEX, SIZES, Manifest, ShardIndex, ShardReader, read_index
from files.shown import shown


def check_folder(folder: Path, manifest: Manifest) -> list[str]:
    """Problems of the files beside the tars: counts that disagree, tars that nobody names, a missing empty prompt."""
    problems = []
    index = read_index(folder, strings=False)
    samples = sum(shard.samples for shard in manifest.shards)
    if len(index) != samples:
        problems.append(f"index.parquet has {len(index)} rows, the manifest's shards {samples} samples")
    counts = np.bincount(index.bucket, minlength=len(manifest.buckets)).tolist()
    expected = [bucket.count for bucket in manifest.buckets]
    if counts != expected:
        problems.append(f"samples by bucket are {counts} in index.parquet, {expected} in the manifest")
    if [bucket.id for bucket in manifest.buckets] != list(range(len(manifest.buckets))):
        problems.append("the manifest's buckets are not numbered from 0")
    for bucket in manifest.buckets:
        if bucket.width % 16 or bucket.height % 16:
            problems.append(f"bucket {bucket.width}x{bucket.height}: sides must be multiples of 16")
    sizes = folder / SIZES
    if not sizes.is_file() or json.loads(sizes.read_bytes()) != {
        shard.name: shard.samples for shard in manifest.shards
    }:
        problems.append(f"{SIZES} does not agree with the manifest")
    unknown = {path.name for path in folder.glob("*.tar")} - {shard.name for shard in manifest.shards}
    problems += [f"{shown(name)} is not in the manifest" for name in sorted(unknown)]
    if manifest.payload == "safetensors" and not (folder / EMPTY_PROMPT).is_file():
        problems.append(f"{EMPTY_PROMPT} is missing")
    return problems


def check_shard(folder: Path, manifest: Manifest, position: int, decode: bool) -> list[str]:
    """Problems of one tar: its size and hash, its members against the index, and (`decode`) each sample's content."""
    shard = manifest.shards[position]
    path = folder / shard.name
    if not path.is_file():
        return [f"{shard.name} is missing"]
    if path.stat().st_size != shard.bytes:
        return [f"{shard.name} has {path.stat().st_size} bytes, the manifest says {shard.bytes}"]
    with path.open("rb") as file:
        if hashlib.file_digest(file, "sha256").hexdigest() != shard.sha256:
            return [f"{shard.name} does not have the manifest's sha256: its content changed"]
    index = _index(folder, (folder / INDEX).stat().st_mtime_ns)
    rows = np.flatnonzero(index.shard == position)
    try:
        samples = dict(tar_samples(path))
    except ValueError as error:
        return [str(error)]
    problems = []
    if len(samples) != len(rows) or len(rows) != shard.samples:
        problems.append(f"{shard.name} holds {len(samples)} samples, index {len(rows)}, manifest {shard.samples}")
    reader = ShardReader(folder, manifest)
    for row in rows:
        key = str(index.key[row])
        if key not in samples:
            problems.append(f"{shard.name}: {shown(key)} is in the index only")
            continue
        problem = _place_problem(samples[key], index, int(row), manifest)
        if problem is None and decode:
            problem = _content_problem(reader, index, int(row), manifest)
        if problem:
            problems.append(f"{shard.name}: {shown(key)} ({shown(index.path[row])}): {problem}")
    reader.close()
    return problems


@functools.lru_cache(maxsize=1)
def _index(folder: Path, changed: int) -> ShardIndex:
    """The index, read once by each process that checks several shards."""
    return read_index(folder)


def _place_problem(members: list[Member], index: ShardIndex, row: int, manifest: Manifest) -> str | None:
    """Members of the tar against offsets and sizes of the index. Shards of others may lack json and txt (size 0)."""
    named = {
        ("payload" if member.suffix not in ("json", "txt", "caption") else member.suffix): member for member in members
    }
    for name in ("payload", "json", "txt"):
        member = named.get(name) or (named.get("caption") if name == "txt" else None)
        place = int(getattr(index, f"{name}_offset")[row]), int(getattr(index, f"{name}_size")[row])
        if member is None:
            if "indexed_by" not in manifest.options or name == "payload":
                return f"has no {name} member"
        elif place != (member.offset, member.size):
            return f"{name} is at {member.offset} + {member.size} bytes, the index says {place[0]} + {place[1]}"
    suffixes = [member.suffix for member in members]
    if "indexed_by" not in manifest.options and suffixes != [manifest.payload, "json", "txt"]:
        return f"members are {', '.join(suffixes)}, not {manifest.payload}, json, txt"
    return None


def _content_problem(reader: ShardReader, index: ShardIndex, row: int, manifest: Manifest) -> str | None:
    def member(name: str) -> bytes:
        offset, size = (getattr(index, f"{name}_{field}")[row] for field in ("offset", "size"))
        return reader.read(int(index.shard[row]), int(offset), int(size))

    bucket = manifest.buckets[index.bucket[row]]
    try:
        text = member("txt").decode()
        payload = member("payload")
        if manifest.payload == "safetensors":
            return _tensors_problem(payload, bucket.width, bucket.height, int(index.prompt_tokens[row]))
        decode_stored(payload, bucket.width, bucket.height)
        if "indexed_by" in manifest.options:
            return None
        record = json.loads(member("json"))
        if (record["key"], record["caption"]) != (index.key[row], text):
            return f"json says key {record['key']} and caption {record['caption'][:40]!r}, not {text[:40]!r}"
        if len(text) != index.caption_length[row]:
            return f"caption has {len(text)} characters, the index says {index.caption_length[row]}"
    except (ValueError, KeyError, OSError, SyntaxError) as error:
        return f"cannot be decoded: {error}"
    return None


def _tensors_problem(payload: bytes, width: int, height: int, tokens: int) -> str | None:
    """Names, shapes and types in a safetensors header; the format is 8 bytes of length, then JSON."""
    length = int.from_bytes(payload[:8], "little")
    header: dict[str, Any] = json.loads(payload[8 : 8 + length])
    latent, prompt = header["latent"], header["prompt_embeds"]
    if latent["shape"] != [16, height // 8, width // 8]:
        return f"latent is {latent['shape']}, its bucket needs {[16, height // 8, width // 8]}"
    if len(prompt["shape"]) != 2 or tokens not in (0, prompt["shape"][0]):
        return f"prompt_embeds is {prompt['shape']}, the index says {tokens} tokens"
    if {latent["dtype"], prompt["dtype"]} != {"BF16"}:
        return f"latent is {latent['dtype']}, prompt_embeds {prompt['dtype']}: both must be BF16"
    if (
        max(entry["data_offsets"][1] for name, entry in header.items() if name != "__metadata__")
        != len(payload) - 8 - length
    ):
        return "safetensors payload is not as long as its header says"
    return None
