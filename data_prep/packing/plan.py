"""The plan: which input goes into which shard, decided once from headers, before anything is packed.

plan/plan.parquet holds one row an input and one row group a shard; plan/plan.json the options, the fingerprint over
options and inputs, and what is expected. It is the same for every process and machine that sees the same inputs.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import itertools
import json
import os
import shutil
from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from data_prep.images.skip_reasons import (
    DUPLICATE,
    FAILED,
    FILTERED,
    NO_CAPTION,
    NO_MASK,
    NO_READER,
    NO_WEIGHT,
    BadImage,
)
from data_prep.packing.duplicates import Duplicates
from data_prep.packing.workers import Job, Probe, Workers, probe
from data_prep.shard_format.row_groups import write_row_groups
from data_prep.shard_format.shards import bucket_name
from data_prep.sources.find_inputs import Sources
from data_prep.sources.found_input import Input, MaskFile, Partner
from data_prep.sources.regular_files import open_regular, read_regular
from files.atomic_files import commit, json_bytes, partial_path, write_file
from files.shown import shown

PLAN_FOLDER = "plan"
MAX_EXAMPLES = 10  # failures that are shown
# Rows that a shard may hold for one sample, so that a shard of many failures still ends.
MAX_ROWS_PER_SAMPLE = 4
# Bytes a pixel of photographs, by which the size of a shard is foreseen (bench/packing.py).
BYTES_PER_PIXEL = {"jpg": 0.5, "png": 2.0}
MASK_BYTES_PER_PIXEL = 0.05  # of soft shapes; drawn ones take less
PLAN_ROWS = pa.schema(
    [("path", pa.string()), ("file", pa.binary()), ("offset", pa.int64()), ("size", pa.int64())]
    + [(name, pa.string()) for name in ("caption", "kind", "status", "reason", "detail")]
    + [("sources", pa.string())]  # of a pair: JSON of its source images; else empty
    + [("more_captions", pa.string())]  # JSON of the captions behind the first; empty where there are none
    + [("weight", pa.float64()), ("area", pa.int64())]
    + [("mask", pa.string())]  # JSON of the file of its mask; empty where it has none
)
ITEM_COLUMNS = ("path", "file", "offset", "size", "caption", "kind", "weight", "area")


@dataclasses.dataclass(frozen=True)
class PlanOptions:
    """What the plan needs beyond the images' own options."""

    on_missing_caption: str = "skip"  # skip | empty | error
    on_missing_mask: str = "whole"  # whole | skip | error
    remove_duplicates: str = "none"  # none | exact | perceptual
    duplicate_distance: int = 4
    samples_per_shard: int = 10_000
    shard_bytes: int = 1_000_000_000

    def __post_init__(self) -> None:
        assert self.on_missing_caption in ("skip", "empty", "error"), self
        if not 1 <= self.samples_per_shard <= 200_000:
            raise ValueError(f"--samples_per_shard {self.samples_per_shard}: must be from 1 to 200000")
        if self.shard_bytes < 1:
            raise ValueError(f"--shard_megabytes {self.shard_bytes // 10**6}: must be at least 1")


@dataclasses.dataclass(frozen=True)
class Row:
    """One input with what the plan decided. `status` is ok, filtered or failed."""

    item: Input
    status: str
    reason: str
    detail: str


@dataclasses.dataclass(frozen=True)
class Plan:
    """plan.json: the shards and what is expected of them."""

    fingerprint: str  # sha256 over options and inputs
    inputs_sha256: str
    options: dict[str, Any]
    shard_rows: list[int]  # inputs of each shard
    shard_samples: list[int]  # those that are expected to become samples
    reasons: dict[str, int]  # "failed: truncated image" -> how many
    first: dict[str, str]  # the first input of each reason, with the details
    examples: list[str]  # the first failures
    remarks: list[str]  # what was seen in the sources and is no input, and what is odd about captions
    ignored: dict[str, int]  # files that are neither images nor captions, by extension
    largest_memory: int  # bytes that the largest image takes to decode, about
    buckets: dict[str, int]  # by bucket_name
    expected_bytes: int
    versions: dict[str, str]
    rows_sha256: str  # of plan.parquet
    images: int = 0  # that have several rows, one for each size that they are stored at
    masked: int = 0  # samples that have a mask

    @property
    def inputs(self) -> int:
        return sum(self.shard_rows)

    @property
    def samples(self) -> int:
        return sum(self.shard_samples)

    @property
    def failed(self) -> int:
        return sum(count for reason, count in self.reasons.items() if reason.startswith("failed"))


def fingerprint(options: dict[str, Any], inputs_sha256: str) -> str:
    return hashlib.sha256(json_bytes([options, inputs_sha256])).hexdigest()


class HashedInputs:
    """Passes inputs through while hashing paths, places, sizes, captions and problems: the identity of a data set."""

    def __init__(self, source: Iterable[Input]) -> None:
        self._source = source
        self._hash = hashlib.sha256()

    def __iter__(self) -> Iterator[Input]:
        for item in self._source:
            self._hash.update(digest_of(item))
            yield item

    @property
    def sha256(self) -> str:
        return self._hash.hexdigest()


def digest_of(item: Input) -> bytes:
    fields = [item.path, item.offset, item.size, item.caption, item.problem, item.kind]
    if item.sources:
        fields.append([[partner.path, partner.size] for partner in item.sources])
    if item.more_captions:
        fields.append({"more_captions": item.more_captions})
    if item.weight != 1:
        fields.append({"weight": item.weight})
    if item.mask is not None:
        fields.append({"mask": [item.mask.path, item.mask.offset, item.mask.size]})
    return hashlib.sha256(json.dumps(fields).encode()).digest()


# ── making it ────────────────────────────────────────────────────────────────────────────────────────────────────────


class _Tally:
    """What is counted while rows are decided."""

    def __init__(self) -> None:
        self.reasons: Counter[str] = Counter()
        self.buckets: Counter[str] = Counter()
        self.first: dict[str, str] = {}
        self.examples: list[str] = []
        self.memory = self.masked = 0
        self.shard_rows: list[int] = []
        self.shard_samples: list[int] = []
        self.bytes = 0.0
        self.images = 0


def make_plan(
    source: Sources,
    folder: Path,
    workers: Workers,
    job: Job,
    plan_options: PlanOptions,
    options: dict[str, Any],
    versions: dict[str, str],
    progress: Any,
) -> Plan:
    """Read every header, decide on every input, write plan.parquet and plan.json under `folder`; return the plan.

    `progress` has update(n) (a tqdm bar). Raises ValueError where a missing caption is an error.
    """
    inputs = HashedInputs(source)
    tally = _Tally()
    (folder / PLAN_FOLDER).mkdir(exist_ok=True)
    rows = _decide(inputs, workers, job, plan_options, tally, progress)
    write_row_groups(rows_file(folder), _shards(rows, job.options.format, plan_options, tally), PLAN_ROWS)
    plan = Plan(
        fingerprint(options, inputs.sha256),
        inputs.sha256,
        options,
        tally.shard_rows,
        tally.shard_samples,
        dict(sorted(tally.reasons.items())),
        tally.first,
        tally.examples,
        source.remarks.lines(),
        dict(source.ignored.most_common()),
        tally.memory,
        dict(sorted(tally.buckets.items())),
        int(tally.bytes),
        versions,
        file_sha256(rows_file(folder)),
        tally.images,
        tally.masked,
    )
    write_file(plan_file(folder), json_bytes(dataclasses.asdict(plan)))
    return plan


def _decide(
    inputs: Iterable[Input], workers: Workers, job: Job, options: PlanOptions, tally: _Tally, progress: Any
) -> Iterator[tuple[Row, Probe | None]]:
    duplicates = Duplicates(options.remove_duplicates, options.duplicate_distance)
    # Two readers of one stream, at most the workers' window apart: what is to be probed, and everything.
    every, usable = itertools.tee(_captioned(inputs, options.on_missing_caption))
    probes = workers.map(probe, job, (row.item for row in usable if row.status == "ok"), chunk=64)
    for row in every:
        progress.update(1)
        if row.status == "ok":
            found = next(probes)
            if isinstance(found, BadImage):
                row = Row(row.item, found.status, found.reason, found.detail)
            elif first := duplicates.find(found.digest, row.item.path):
                row = Row(row.item, FILTERED, DUPLICATE, f"of {first}")
            elif not found.masked and options.on_missing_mask != "whole":
                row = _without_mask(row.item, options.on_missing_mask)
            else:
                tally.memory = max(tally.memory, found.memory)
                tally.images += bool(found.others)
                for size in (found, *found.others):
                    tally.masked += size.masked
                    yield dataclasses.replace(row, item=dataclasses.replace(row.item, area=size.area)), size
                continue
        why = f"{row.status}: {row.reason}"
        tally.reasons[why] += 1
        tally.first.setdefault(why, f"{row.item.path}" + (f" ({row.detail})" if row.detail else ""))
        if row.status == FAILED and len(tally.examples) < MAX_EXAMPLES:
            tally.examples.append(f"{row.item.path}: {row.reason}" + (f" ({row.detail})" if row.detail else ""))
        yield row, None


def _captioned(inputs: Iterable[Input], on_missing: str) -> Iterator[Row]:
    for item in inputs:
        if item.problem:
            yield Row(item, FILTERED if item.problem[0] == NO_READER else FAILED, *item.problem)
        elif item.weight == 0:
            yield Row(item, FILTERED, NO_WEIGHT, "")
        elif item.caption or on_missing == "empty":
            yield Row(dataclasses.replace(item, caption=item.caption or ""), "ok", "", "")
        elif on_missing == "skip":
            kind = "missing" if item.caption is None else "empty"
            yield Row(item, FILTERED, NO_CAPTION, f"{kind}: {item.hint}" if item.hint else kind)
        else:
            kind = "has no caption" if item.caption is None else "has an empty caption"
            hint = f" ({item.hint})" if item.hint else ""
            raise ValueError(
                f"{shown(item.path)} {kind}{shown(hint)}: write one, or choose --on_missing_caption skip or empty"
            )


def _without_mask(item: Input, on_missing: str) -> Row:
    if on_missing == "error":
        raise ValueError(f"{shown(item.path)} has no mask: make one, or choose --on_missing_mask whole or skip")
    return Row(item, FILTERED, NO_MASK, "")


def _shards(
    rows: Iterable[tuple[Row, Probe | None]], payload: str, options: PlanOptions, tally: _Tally
) -> Iterator[dict[str, list[Any]]]:
    """Cut the rows into shards; yield each as columns of PLAN_ROWS."""
    bytes_per_pixel = BYTES_PER_PIXEL[payload]
    shard: list[Row] = []
    samples, size = 0, 0.0

    def close() -> dict[str, list[Any]]:
        tally.shard_rows.append(len(shard))
        tally.shard_samples.append(samples)
        tally.bytes += size
        columns: dict[str, list[Any]] = {name: [getattr(row.item, name) for row in shard] for name in ITEM_COLUMNS}
        columns["sources"] = [write_partners(row.item.sources) for row in shard]
        columns["more_captions"] = [write_captions(row.item.more_captions) for row in shard]
        columns["mask"] = [write_mask(row.item.mask) for row in shard]
        return columns | {name: [getattr(row, name) for row in shard] for name in ("status", "reason", "detail")}

    for row, found in rows:
        expected = 0.0
        if found is not None:
            places = [found.placement, *found.sources]
            sizes = [(place.width, place.height) for place in places]
            tally.buckets[bucket_name(*sizes[0], sizes[1:])] += 1
            given = row.item.size + sum(partner.size for partner in row.item.sources)
            # 4 kB: three tar headers with padding, json and text.
            pixels = sum(width * height for width, height in sizes)
            headers = 4096 + 1024 * len(found.sources)
            mask = MASK_BYTES_PER_PIXEL * found.masked * sizes[0][0] * sizes[0][1]
            expected = headers + mask + (given if found.copied else bytes_per_pixel * pixels)
        full = samples >= options.samples_per_shard or (samples and size + expected > options.shard_bytes)
        if (found is not None and full) or len(shard) >= MAX_ROWS_PER_SAMPLE * options.samples_per_shard:
            yield close()
            shard, samples, size = [], 0, 0.0
        shard.append(row)
        samples, size = samples + (found is not None), size + expected
    if shard:
        yield close()


def write_partners(sources: tuple[Partner, ...]) -> str:
    """A pair's source images as the plan keeps them."""
    return json.dumps([[p.path, os.fsdecode(p.file), p.size] for p in sources]) if sources else ""


def read_partners(text: str | None) -> tuple[Partner, ...]:
    """The inverse; plans of earlier versions have none."""
    return tuple(Partner(path, os.fsencode(file), size) for path, file, size in json.loads(text or "[]"))


def write_captions(more: tuple[str, ...]) -> str:
    """The captions behind an input's first as the plan keeps them."""
    return json.dumps(more) if more else ""


def read_captions(text: str | None) -> tuple[str, ...]:
    """The inverse; plans of earlier versions have none."""
    return tuple(json.loads(text or "[]"))


def write_mask(mask: MaskFile | None) -> str:
    """An image's mask as the plan keeps it."""
    return json.dumps([mask.path, os.fsdecode(mask.file), mask.offset, mask.size, mask.kind]) if mask else ""


def read_mask(text: str | None) -> MaskFile | None:
    """The inverse."""
    if not text:
        return None
    path, file, offset, size, kind = json.loads(text)
    return MaskFile(path, os.fsencode(file), offset, size, kind)


# ── reading it ───────────────────────────────────────────────────────────────────────────────────────────────────────


def plan_file(folder: Path) -> Path:
    """Where the plan of an output folder stands; written last, so its time is that of the whole plan."""
    return folder / PLAN_FOLDER / "plan.json"


def rows_file(folder: Path) -> Path:
    """Where its rows stand, one an input."""
    return folder / PLAN_FOLDER / "plan.parquet"


def read_plan(folder: Path) -> Plan | None:
    """The plan of an output folder; None when there is none, it was not finished, or it is damaged (`plan_is_damaged`)."""
    try:
        fields = json.loads(read_regular(plan_file(folder)))
        plan = Plan(**fields)
        whole = file_sha256(rows_file(folder)) == plan.rows_sha256
        fits = all(isinstance(count, int) for count in [*plan.shard_rows, *plan.shard_samples])
        return plan if whole and fits and fingerprint(plan.options, plan.inputs_sha256) == plan.fingerprint else None
    except (OSError, TypeError, ValueError, RecursionError):
        return None


def plan_is_damaged(folder: Path) -> bool:
    """Whether there is a plan that cannot be read, or is of another version."""
    return plan_file(folder).exists() and read_plan(folder) is None


@contextlib.contextmanager
def rebuilt_if_damaged(folder: Path) -> Iterator[Path]:
    """Where to make the plan of `folder`: there, or, when a damaged one lies there, beside it until it is found to fit.

    Raises ValueError when shards were packed by another plan than the new one: nothing of them is overwritten.
    """
    if not plan_is_damaged(folder):
        yield folder
        return
    print(f"{shown(plan_file(folder).parent)} is damaged, or of another version: made again")
    place = partial_path(folder / PLAN_FOLDER / "rebuilt")
    place.mkdir()
    try:
        yield place
        new = read_plan(place)
        assert new is not None, "it was just written"
        for stats in sorted(folder.glob("[0-9]*_stats.json")):
            try:
                packed_by = json.loads(read_regular(stats))["fingerprint"]
            except (OSError, ValueError, KeyError, TypeError, RecursionError):
                continue
            if packed_by != new.fingerprint:
                raise ValueError(
                    f"{shown(folder)} was begun with other options or inputs, or by another version, and its plan is"
                    " damaged: choose another --output_path"
                )
        for file in (rows_file, plan_file):
            commit(file(place), file(folder))
    finally:
        shutil.rmtree(place, ignore_errors=True)


def file_sha256(path: Path) -> str:
    with open_regular(path) as file:
        return hashlib.file_digest(file, "sha256").hexdigest()  # type: ignore[arg-type]  # IO has no readinto, the file has


def _item(values: dict[str, Any]) -> dict[str, Any]:
    """An input's fields of a row of the plan; plans of earlier versions have no weights and areas."""
    return {"weight": 1.0, "area": 0} | {name: values[name] for name in ITEM_COLUMNS if name in values}


class PlanRows:
    """Rows of a plan, one shard at a time."""

    def __init__(self, folder: Path) -> None:
        self._file = pq.ParquetFile(rows_file(folder))

    def shard(self, number: int) -> list[Row]:
        return [
            Row(
                Input(
                    **_item(values),
                    more_captions=read_captions(values.get("more_captions")),
                    sources=read_partners(values.get("sources")),
                    mask=read_mask(values.get("mask")),
                ),
                values["status"],
                values["reason"],
                values["detail"],
            )
            for values in self._file.read_row_group(number).to_pylist()
        ]

    def all(self) -> Iterator[Row]:
        for number in range(self._file.num_row_groups):
            yield from self.shard(number)
