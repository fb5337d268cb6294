"""What a packing run would give, without writing: buckets, size and time from a few images that are really converted."""

from __future__ import annotations

import itertools
import time

from data_prep.images.skip_reasons import BadImage
from data_prep.packing.plan import BYTES_PER_PIXEL, Plan, PlanRows
from data_prep.packing.plan_lines import lines
from data_prep.packing.workers import Job, Workers, store
from data_prep.sources.found_input import Input
from files.shown import shown

TRIED = 32  # images that are converted for the estimate, evenly spread over the plan


def dry_run(plan: Plan, rows: PlanRows, workers: Workers, job: Job) -> None:
    """Print counts per bucket, the expected size and time, reasons and the first failures."""
    print(f"{plan.inputs} inputs -> {plan.samples} samples in {len(plan.shard_rows)} shards")
    print("\n  bucket        samples")
    for name, count in sorted(plan.buckets.items(), key=lambda item: -item[1]):
        print(f"  {name:<12} {count:>8}  {'#' * max(1, round(40 * count / max(plan.buckets.values())))}")
    for line in lines(plan):
        print(line)
    tried = _tried(plan, rows)
    list(workers.map(store, job, tried[:1], chunk=1))  # imports and warms
    start, failed, size, foreseen = time.perf_counter(), 0, 0, 0.0
    for item, result in zip(tried, workers.map(store, job, tried, chunk=1), strict=True):
        if isinstance(result, BadImage):
            failed += 1
            print(f"            {shown(item.path)}: {shown(result)}")
        else:
            stored = result[0]
            size += len(stored.data)
            area = stored.placement.width * stored.placement.height
            per_pixel = BYTES_PER_PIXEL[job.options.format]
            foreseen += item.size if stored.copied else per_pixel * area
    seconds = (time.perf_counter() - start) * plan.samples / max(1, len(tried))
    megabytes = plan.expected_bytes / 1e6 * (size / foreseen if foreseen else 1)
    print(f"\nexpected: about {megabytes:.1f} MB and {seconds:.0f} s with --num_workers {workers.count}", end="")
    print(f" (by converting {len(tried)} of them, {failed} failed); nothing was written")


def _tried(plan: Plan, rows: PlanRows) -> list[Input]:
    every = max(1, plan.samples // TRIED)
    usable = (row.item for row in rows.all() if row.status == "ok")
    return list(itertools.islice(itertools.islice(usable, 0, None, every), TRIED))
