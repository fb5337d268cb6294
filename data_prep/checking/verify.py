"""What makes a data set whole: hashes, members, their order; index, rows and plan against each other; samples that decode."""

from __future__ import annotations

import functools
import json
import tarfile
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from data_prep.images.stored_pixels import decode_mask, decode_stored, latent_mask, mask_share
from data_prep.packing.pack import stats_of
from data_prep.packing.plan import file_sha256, plan_file, read_plan
from data_prep.shard_format.scan_tars import Member, tar_samples
from data_prep.shard_format.shards import (
    CAPTION_ROWS,
    EMPTY_PROMPT,
    INDEX,
    INDEX_ROWS,
    MASK_ROWS,
    MASK_SUFFIX,
    OPTIONAL_INDEX_ROWS,
    PAIR_ROWS,
    SHARD_ROWS,
    SIZES,
    WEIGHT_ROWS,
    Bucket,
    Manifest,
    ShardIndex,
    ShardReader,
    members_of,
    padded,
    read_index,
    rows_name,
    source_suffix,
    tar_name,
    variant_rows,
    variant_suffix,
    variants_in,
    variants_of,
    with_more,
)
from data_prep.sources.regular_files import read_regular
from files.shown import one_line

SOURCE = source_suffix(0)  # how the suffixes of source members begin
VARIANT_MEMBER = variant_suffix(2)[:-13]  # and those of caption variants
ROW_FIELDS = [
    name for name in INDEX_ROWS.names if name not in ("shard", "bucket")
]  # in index.parquet and in NNNNNN.parquet


def check_folder(folder: Path, manifest: Manifest) -> list[str]:
    """Problems of the files beside the tars: counts that disagree, tars that nobody names, a missing empty prompt."""
    try:
        return _check_folder(folder, manifest)
    except Exception as error:  # nothing that a damaged set holds ends the check of the rest
        return [f"the index cannot be checked: {one_line(_said(error))}"]


def check_shard(folder: Path, manifest: Manifest, position: int, decode: bool) -> list[str]:
    """Problems of one tar: its size and hash, its members against index and rows, and (`decode`) each sample's content."""
    name = manifest.shards[position].name
    try:
        return _check_shard(folder, manifest, position, decode)
    except Exception as error:
        return [f"{name} cannot be checked: {one_line(_said(error))}"]


def _said(error: Exception) -> str:
    return str(error) if isinstance(error, ValueError | OSError) else f"{type(error).__name__}: {error}"


def _check_folder(folder: Path, manifest: Manifest) -> list[str]:
    problems = []
    index = read_index(folder)
    samples = sum(shard.samples for shard in manifest.shards)
    if len(index) != samples:
        problems.append(f"index.parquet has {len(index)} rows, the manifest's shards {samples} samples")
    if manifest.totals.get("samples") != samples:
        problems.append(f"the manifest's totals say {manifest.totals.get('samples')} samples, its shards {samples}")
    for name, values, limit in (
        ("bucket", index.bucket, len(manifest.buckets)),
        ("shard", index.shard, len(manifest.shards)),
    ):
        wrong = np.flatnonzero((values < 0) | (values >= limit))
        if len(wrong):
            row = wrong[0]
            problems.append(
                f"index.parquet: {len(wrong)} rows name a {name} that the manifest has not, first row {row}: {values[row]}"
            )
    inside = index.bucket[(index.bucket >= 0) & (index.bucket < len(manifest.buckets))]
    counts = np.bincount(inside, minlength=len(manifest.buckets)).tolist()
    expected = [bucket.count for bucket in manifest.buckets]
    if counts != expected:
        problems.append(f"samples by bucket are {counts} in index.parquet, {expected} in the manifest")
    keys, first, times = np.unique(index.key, return_index=True, return_counts=True)
    if len(keys) < len(index):
        problems.append(
            f"index.parquet: {len(index) - len(keys)} keys come twice, first {index.key[first[times > 1][0]]}"
        )
    if manifest.payload != "safetensors" and index.prompt_tokens.any():
        problems.append("index.parquet: prompt_tokens of image shards must be 0")
    if [bucket.id for bucket in manifest.buckets] != list(range(len(manifest.buckets))):
        problems.append("the manifest's buckets are not numbered from 0")
    for bucket in manifest.buckets:
        if any(side % 16 for size in ((bucket.width, bucket.height), *bucket.sources) for side in size):
            problems.append(f"bucket {bucket}: sides must be multiples of 16")
    if _json(folder / SIZES) != {shard.name: shard.samples for shard in manifest.shards}:
        problems.append(f"{SIZES} does not agree with the manifest")
    unknown = {path.name for path in folder.glob("*.tar")} - {shard.name for shard in manifest.shards}
    problems += [f"{name} is not in the manifest" for name in sorted(unknown)]
    paired = any(bucket.sources for bucket in manifest.buckets)  # their empty captions stand with the samples
    if manifest.payload == "safetensors" and not paired and not (folder / EMPTY_PROMPT).is_file():
        problems.append(f"{EMPTY_PROMPT} is missing")
    return problems + _plan_problems(folder, manifest)


def _plan_problems(folder: Path, manifest: Manifest) -> list[str]:
    """plan/ is what a packing run goes on by, and what the fingerprint stands for."""
    if "indexed_by" in manifest.options or manifest.encoding is not None or "samples_per_shard" not in manifest.options:
        return []
    if not plan_file(folder).parent.is_dir():
        return []  # copied without it, which training doesn't need
    plan = read_plan(folder)
    if plan is None:
        return ["plan/ is damaged: make_shards.py makes it again"]
    problems = []
    if plan.fingerprint != manifest.fingerprint:
        problems.append("plan/plan.json is of another set: its fingerprint is not the manifest's")
    inputs = manifest.totals.get("inputs")
    if plan.inputs != inputs:
        problems.append(f"the manifest's totals say {inputs} inputs, plan/plan.json {plan.inputs}")
    for number in range(len(plan.shard_rows)):
        if not (folder / rows_name(number)).is_file():
            problems.append(f"{rows_name(number)} is missing")
    return problems


def _json(path: Path) -> Any:
    try:
        return json.loads(read_regular(path))
    except (OSError, ValueError, RecursionError):
        return None


def _check_shard(folder: Path, manifest: Manifest, position: int, decode: bool) -> list[str]:
    shard = manifest.shards[position]
    path = folder / shard.name
    if not path.is_file():
        return [f"{shard.name} is missing"]
    if path.stat().st_size != shard.bytes:
        return [f"{shard.name} has {path.stat().st_size} bytes, the manifest says {shard.bytes}"]
    if file_sha256(path) != shard.sha256:
        return [f"{shard.name} does not have the manifest's sha256: its content changed"]
    index = _index(folder, (folder / INDEX).stat().st_mtime_ns)
    rows = np.flatnonzero(index.shard == position)
    problems = _row_problems(folder, manifest, position, index, rows)
    samples = dict(tar_samples(path))
    if len(samples) != len(rows) or len(rows) != shard.samples:
        problems.append(f"{shard.name} holds {len(samples)} samples, index {len(rows)}, manifest {shard.samples}")
    reader = ShardReader(folder, manifest)
    for row in rows:
        key = str(index.key[row])
        if key not in samples:
            problems.append(f"{shard.name}: {key} is in the index only")
            continue
        problem = _place_problem(samples[key], index, int(row), manifest)
        if problem is None and decode:
            problem = _content_problem(reader, index, int(row), manifest)
        if problem:
            problems.append(f"{shard.name}: {key} ({one_line(index.path[row])}): {problem}")
    reader.close()
    return problems


def _row_problems(folder: Path, manifest: Manifest, position: int, index: ShardIndex, rows: np.ndarray) -> list[str]:
    """NNNNNN.parquet and NNNNNN_stats.json of a shard that this program wrote, against the index and the manifest."""
    shard = manifest.shards[position]
    number = int(shard.name[:6]) if shard.name[:6].isdigit() else -1
    if "indexed_by" in manifest.options or shard.name != tar_name(number):
        return []  # made elsewhere: what lies beside such tars is not ours to judge
    name = rows_name(number)
    if not (folder / name).is_file():
        return [f"{name} is missing"]
    problems = []
    stats = stats_of(folder, number)
    if stats is None:
        problems.append(f"{number:06d}_stats.json is missing or damaged")
    elif (stats["samples"], stats["bytes"], stats["sha256"]) != (shard.samples, shard.bytes, shard.sha256):
        problems.append(f"{number:06d}_stats.json does not agree with the manifest")
    elif stats.get("rows_sha256", "") not in ("", file_sha256(folder / name)):
        problems.append(f"{name} does not have the sha256 of {number:06d}_stats.json: its content changed")
    try:
        table = pq.read_table(folder / name, schema=_rows_schema(folder / name))
    except (pa.ArrowException, OSError, ValueError) as error:
        return [*problems, f"{name} is damaged: {str(error).splitlines()[0]}"]
    kept = table.filter(pc.equal(table["status"], "ok"))
    if len(kept) != len(rows):
        return [*problems, f"{name} has {len(kept)} rows of samples, the index {len(rows)}"]
    more = with_more(*OPTIONAL_INDEX_ROWS, variant_rows(1))
    optional = [name for name in more.names if name in kept.schema.names]
    for field in [*ROW_FIELDS, *optional]:
        there, here = kept[field].to_pylist(), getattr(index, field)[rows].tolist()
        wrong = next((place for place in range(len(rows)) if there[place] != here[place]), None)
        if wrong is not None:
            what = f"{field} is {there[wrong]!r} in {name}, {here[wrong]!r} in index.parquet"
            problems.append(f"{shard.name}: {index.key[rows[wrong]]}: {one_line(what)}")
    return problems


def _rows_schema(path: Path) -> pa.Schema:
    schema = pq.read_schema(path)
    optional = PAIR_ROWS, CAPTION_ROWS, WEIGHT_ROWS, MASK_ROWS
    found = [more for more in optional if set(more.names) <= set(schema.names)]
    variants = variants_in(schema)
    return with_more(SHARD_ROWS, *found, *[variant_rows(variants)] * (variants > 1))


@functools.lru_cache(maxsize=1)
def _index(folder: Path, changed: int) -> ShardIndex:
    """The index, read once by each process that checks several shards."""
    return read_index(folder)


def _place_problem(members: list[Member], index: ShardIndex, row: int, manifest: Manifest) -> str | None:
    """Members of the tar against offsets and sizes of the index. Shards of others may lack json and txt (size 0)."""
    sources = [member for member in members if member.suffix.startswith((SOURCE, VARIANT_MEMBER))]
    members = [member for member in members if member not in sources]
    masks = [member for member in members if member.suffix == MASK_SUFFIX]
    members = [member for member in members if member not in masks]
    if problem := _mask_problem(masks, index, row, manifest):
        return problem
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
    if manifest.payload == "safetensors":
        expected = [variant_suffix(number) for number in range(2, 2 + len(sources))]
        if (found := [member.suffix for member in sources]) != expected or len(found) >= max(
            1, index.variant_tokens.shape[1]
        ):
            return f"variants are {', '.join(found)} of {index.variant_tokens.shape[1]}"
    if "indexed_by" not in manifest.options and manifest.payload != "safetensors":
        return _sources_problem(sources, index, row, manifest)
    return None


def _mask_problem(masks: list[Member], index: ShardIndex, row: int, manifest: Manifest) -> str | None:
    """The mask member of an image sample against the index; encoded samples have it among their tensors."""
    said = int(index.mask_offset[row]), int(index.mask_size[row])
    found = (masks[0].offset, masks[0].size) if masks else (0, 0)
    if "indexed_by" in manifest.options and said == (0, 0):
        return None  # made elsewhere: a member of that name may be anything
    if len(masks) > 1 or found != said:
        return f"mask is at {found[0]} + {found[1]} bytes, the index says {said[0]} + {said[1]}"
    if manifest.payload != "safetensors" and bool(masks) != (index.mask_share[row] >= 0):
        return f"has {len(masks)} masks, the index says a share of {index.mask_share[row]:g}"
    return None


def _sources_problem(sources: list[Member], index: ShardIndex, row: int, manifest: Manifest) -> str | None:
    """The source members of a pair against its bucket, and their run against the index."""
    expected = [
        f"{source_suffix(number)}.{manifest.payload}" for number in range(len(bucket_of(index, row, manifest).sources))
    ]
    if (found := [member.suffix for member in sources]) != expected:
        return f"source images are {', '.join(found) or 'none'}, its bucket needs {', '.join(expected) or 'none'}"
    start = sources[0].offset - tarfile.BLOCKSIZE if sources else 0
    run = start, sources[-1].offset + sources[-1].size - start if sources else 0
    said = int(index.sources_offset[row]), int(index.sources_size[row])
    if run != said:
        return f"source images are at {run[0]} + {run[1]} bytes, the index says {said[0]} + {said[1]}"
    return None


def bucket_of(index: ShardIndex, row: int, manifest: Manifest) -> Bucket:
    """Raises ValueError for a number that the manifest has not."""
    number = int(index.bucket[row])
    if not 0 <= number < len(manifest.buckets):
        raise ValueError(f"the index names bucket {number}, the manifest has {len(manifest.buckets)}")
    return manifest.buckets[number]


def _content_problem(reader: ShardReader, index: ShardIndex, row: int, manifest: Manifest) -> str | None:
    def member(name: str) -> bytes:
        offset, size = (getattr(index, f"{name}_{field}")[row] for field in ("offset", "size"))
        return reader.read(int(index.shard[row]), int(offset), int(size))

    try:
        bucket = bucket_of(index, row, manifest)
        text = member("txt").decode()
        payload = member("payload")
        if manifest.payload == "safetensors":
            tokens = int(([*index.variant_tokens[row], index.prompt_tokens[row]])[0])
            problem = _tensors_problem(payload, bucket, tokens, manifest.encoding is not None)
            problem = problem or _mask_tensor_problem(payload, bucket, float(index.mask_share[row]))
            if problem:
                return problem
        else:
            decode_stored(payload, bucket.width, bucket.height)
            if index.mask_size[row]:
                mask = latent_mask(decode_mask(member("mask"), bucket.width, bucket.height))
                if problem := _share_problem(mask, float(index.mask_share[row])):
                    return problem
            for source, size in zip(members_of(member("sources")), bucket.sources, strict=True):
                decode_stored(source, *size)
        if len(text) != index.caption_length[row]:
            return f"caption has {len(text)} characters, the index says {index.caption_length[row]}"
        if "indexed_by" in manifest.options:
            return None
        record = member("json")
        if manifest.payload != "safetensors":
            return _record_problem(json.loads(record), index, row, text) or _captions_problem(
                json.loads(record).get("captions", [text]), index, row, text
            )
        return _record_problem(json.loads(record), index, row, text) or _variants_problem(
            reader, record, index, row, text
        )
    except Exception as error:  # whatever damaged bytes make of a decoder or of a record
        return f"cannot be decoded: {one_line(_said(error))}"


def _share_problem(mask: np.ndarray, said: float) -> str | None:
    found = mask_share(mask)
    return None if abs(found - said) < 1e-6 else f"the mask's mean is {found:.6f}, the index says {said:.6f}"


def _mask_tensor_problem(payload: bytes, bucket: Bucket, said: float) -> str | None:
    """The mask among an encoded sample's tensors: there if the index says so, of the latent's size, with its mean."""
    length = int.from_bytes(payload[:8], "little")
    entry = json.loads(payload[8 : 8 + length]).get("mask")
    if (entry is None) != (said < 0):
        return f"has {'no' if entry is None else 'a'} mask, the index says {'none' if said < 0 else 'one'}"
    if entry is None:
        return None
    size = [bucket.height // 8, bucket.width // 8]
    if (entry["dtype"], entry["shape"]) != ("U8", size):
        return f"mask is {entry['dtype']} {entry['shape']}, its bucket needs U8 {size}"
    start, end = (8 + length + offset for offset in entry["data_offsets"])
    return _share_problem(np.frombuffer(payload[start:end], np.uint8), said)


def _record_problem(record: dict[str, Any], index: ShardIndex, row: int, text: str) -> str | None:
    """The json member against the index and the caption."""
    if (record["key"], record["caption"]) != (index.key[row], text):
        return f"json says key {record['key']} and caption {record['caption'][:40]!r}, not {text[:40]!r}"
    if record["path"] != index.path[row]:
        return f"json says path {one_line(record['path'])!r}, the index {one_line(index.path[row])!r}"
    if (weight := record.get("weight", 1.0)) != index.weight[row]:
        return f"json says weight {one_line(weight)}, the index {index.weight[row]:g}"
    return None


def _captions_problem(captions: Any, index: ShardIndex, row: int, text: str) -> str | None:
    """All captions of a sample against the index and its first one."""
    if not isinstance(captions, list) or not all(isinstance(caption, str) for caption in captions):
        return "json's captions are no list of texts"
    if captions[:1] != [text]:
        return f"json's captions begin with {str(captions[:1])[1:41]}, the caption is {text[:40]!r}"
    said = int(index.captions[row]), int(index.longest_caption[row])
    found = len(captions), max(map(len, captions))
    if said != found and (len(captions) > 1 or said[0] > 1):
        return f"json has {found[0]} captions, the longest of {found[1]} characters, the index says {said[0]} and {said[1]}"
    return None


def _variants_problem(reader: ShardReader, record: bytes, index: ShardIndex, row: int, text: str) -> str | None:
    """The caption variants of an encoded sample against the index and its first one, and each one's member."""
    draws = index.variant_tokens.shape[1]
    variants = variants_of(record)
    if not variants or not draws:
        return "json tells of variants, the index has none" if variants else None
    said = [0] * draws
    for variant in variants:
        for draw in variant.draws:
            if draw < draws:
                said[draw] = variant.tokens
    there = index.variant_tokens[row].tolist()
    if said != there or variants[0].caption != text or max(said) != index.prompt_tokens[row]:
        return f"json's variants have {said} tokens, the index says {there}, the longest {index.prompt_tokens[row]}"
    end = int(index.txt_offset[row]) + padded(int(index.txt_size[row]))
    for number, variant in enumerate(variants[1:], start=2):
        payload = reader.read(int(index.shard[row]), end + variant.offset, variant.size)
        length = int.from_bytes(payload[:8], "little")
        header = json.loads(payload[8 : 8 + length])
        prompt = header["prompt_embeds"]
        if prompt["dtype"] != "BF16" or prompt["shape"][:1] != [variant.tokens] or list(header) != ["prompt_embeds"]:
            return f"variant {number} is {prompt['shape']} of {prompt['dtype']}, its json says {variant.tokens} tokens"
        if prompt["data_offsets"][1] != len(payload) - 8 - length:
            return f"variant {number} is not as long as its header says"
    return None


def _tensors_problem(payload: bytes, bucket: Bucket, tokens: int, counted: bool) -> str | None:
    """Names, shapes and types in a safetensors header; the format is 8 bytes of length, then JSON."""
    length = int.from_bytes(payload[:8], "little")
    header: dict[str, Any] = json.loads(payload[8 : 8 + length])
    latent, prompt = header["latent"], header["prompt_embeds"]
    sizes = {"latent": (bucket.width, bucket.height)}
    sizes |= {f"source_latent_{number}": size for number, size in enumerate(bucket.sources, start=1)}
    for name, (width, height) in sizes.items():
        if name not in header:
            return f"has no {name}, its bucket {bucket} needs one"
        if header[name]["shape"] != [16, height // 8, width // 8]:
            return f"{name} is {header[name]['shape']}, its bucket needs {[16, height // 8, width // 8]}"
    if len(prompt["shape"]) != 2 or tokens not in ((prompt["shape"][0],) if counted else (0, prompt["shape"][0])):
        return f"prompt_embeds is {prompt['shape']}, the index says {tokens} tokens"
    if {latent["dtype"], prompt["dtype"]} != {"BF16"}:
        return f"latent is {latent['dtype']}, prompt_embeds {prompt['dtype']}: both must be BF16"
    if (
        max(entry["data_offsets"][1] for name, entry in header.items() if name != "__metadata__")
        != len(payload) - 8 - length
    ):
        return "safetensors payload is not as long as its header says"
    return None
