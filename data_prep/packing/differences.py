"""What changed since a plan was made: the options, the list of inputs, and files that were edited and kept their size.

Paths, sizes and captions are the identity of the inputs: a plan reads headers only. An edit in place that keeps the size
(an orientation tag, say) shows in the file's time. The time is no more than a hint, because a copied folder has new ones
too: the bytes of such files are compared with the sha256 that was noted when they were packed, so that a copy goes on and
an edit is refused. What was not packed (filtered, failed) has no sha256 and is not compared.
"""

from __future__ import annotations

import bisect
from array import array
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq

from data_prep.images.skip_reasons import BadImage
from data_prep.packing.plan import HashedInputs, Plan, PlanRows, fingerprint, plan_file
from data_prep.packing.workers import Job, Workers, digest
from data_prep.shard_format.shards import rows_name
from data_prep.sources.found_input import Input
from files.shown import shown


def check_inputs(plan: Plan, options: dict[str, Any], folder: Path, source: Iterable[Input]) -> array[int]:
    """Row numbers of inputs whose files changed in some way after the plan was made, by their times.

    Raises ValueError, with the difference, when options or inputs are not those of the plan.
    """
    planned_at = plan_file(folder).stat().st_mtime_ns
    inputs, touched = HashedInputs(source), array("q")
    for number, item in enumerate(inputs):
        if item.changed >= planned_at:
            touched.append(number)
    if fingerprint(options, inputs.sha256) != plan.fingerprint:
        difference = describe_difference(plan, options, folder, source)
        raise ValueError(
            f"{shown(folder)} was begun with other options or inputs ({difference}): choose another --output_path"
        )
    return touched if not plan.images else rows_of_inputs(folder, set(touched))


def rows_of_inputs(folder: Path, inputs: set[int]) -> array[int]:
    """The rows of a plan that are of these inputs, where an input may have several, the largest area first."""
    found, number, before = array("q"), -1, None
    for place, row in enumerate(PlanRows(folder).all()):
        item = row.item
        again = before is not None and (before.path, before.offset) == (item.path, item.offset)
        number += not (again and before is not None and 0 < item.area < before.area)
        if number in inputs:
            found.append(place)
        before = item
    return found


def check_edits(
    plan: Plan, folder: Path, touched: array[int], shards: Iterable[int], workers: Workers, job: Job
) -> None:
    """Compare the `touched` inputs of these committed shards with what was packed. Raises ValueError naming an edit."""
    edited: list[str] = []
    starts = [0]
    for count in plan.shard_rows:
        starts.append(starts[-1] + count)
    for shard in shards:
        first, last = (bisect.bisect_left(touched, start) for start in starts[shard : shard + 2])
        if first == last:
            continue
        packed = sha256s(folder / rows_name(shard))
        rows = PlanRows(folder).shard(shard)
        places = [number - starts[shard] for number in touched[first:last] if packed[number - starts[shard]]]
        items = [rows[place].item for place in places]
        for place, item, found in zip(places, items, workers.map(digest, job, items, chunk=16), strict=True):
            if isinstance(found, BadImage) or found != packed[place]:
                edited.append(item.path)
    if edited:
        raise ValueError(
            f"{len(edited)} inputs were edited after they had been packed into {shown(folder)}, first {shown(edited[0])}:"
            " choose another --output_path"
        )


def sha256s(rows: Path) -> list[str]:
    """Of each row of a shard, as `workers.digest` spells them; "" where nothing was packed."""
    there = set(pq.read_schema(rows).names)
    names = [name for name in ("sha256", "source_sha256", "mask_sha256") if name in there]
    columns = pq.read_table(rows, columns=names).to_pydict()
    return [",".join(filter(None, each)) for each in zip(*(columns[name] for name in names), strict=True)]


def describe_difference(plan: Plan, options: dict[str, Any], folder: Path, source: Iterable[Input]) -> str:
    """What changed since the plan was made: options by name and value, inputs by count and first path."""
    changes = [
        f"{name} {plan.options.get(name)!r} -> {options.get(name)!r}"
        for name in sorted(plan.options.keys() | options.keys())
        if plan.options.get(name) != options.get(name)
    ]
    if not changes:
        planned = {(row.item.path, row.item.offset): _identity(row.item) for row in PlanRows(folder).all()}
        kinds: dict[str, list[str]] = {"new": [], "changed": [], "gone": []}
        for item in source:
            before = planned.pop((item.path, item.offset), None)
            if before != _identity(item):
                kinds["new" if before is None else "changed"].append(item.path)
        kinds["gone"] = [path for path, _ in planned]
        changes = [f"{len(paths)} inputs {kind}, first {shown(paths[0])}" for kind, paths in kinds.items() if paths]
    return "; ".join(changes) or "the order of the inputs"


def _identity(item: Input) -> tuple[object, ...]:
    """What the plan keeps of it."""
    captions = item.caption or "", *item.more_captions
    partners = tuple((partner.path, partner.size) for partner in item.sources)
    return item.size, captions, item.weight, partners, item.mask and (item.mask.path, item.mask.size)
