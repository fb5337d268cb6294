"""Pack a folder of images and captions into WebDataset shards.

    python data_prep/make_shards.py --dataset_base_path photos --output_path shards --dry_run
    python data_prep/make_shards.py --dataset_base_path photos --output_path shards
    python data_prep/make_shards.py --dataset_base_path photos --dataset_metadata_path photos/metadata.csv \\
        --output_path shards --max_pixels 1048576 --num_workers 16
    python data_prep/check_shards.py shards --report report.html

It may be killed and started again at any time; shards that are finished stay. Slurm: slurm/make_shards.sh.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import errno
import os
import sys
import tempfile
from array import array
from pathlib import Path
from typing import TYPE_CHECKING, Any

from data_prep.packing import pack_flags
from files.shown import one_line, shown, tolerant_output

if TYPE_CHECKING:
    from data_prep.packing.plan import Plan, PlanOptions
    from data_prep.packing.workers import Job, Workers
    from data_prep.sources.find_inputs import Sources
    from files.folder_lock import FolderLock


def main(argv: list[str] | None = None) -> int:
    tolerant_output()
    args = pack_flags.parse(argv, __doc__)
    try:
        run(args)
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            text = f"the disk of {args.output_path} is full; finished shards stay valid: make room and start again"
        else:
            name = error.filename2 or error.filename  # of a rename: what it was to become
            text = f"{error.strerror}: {name}" if name and error.strerror else str(error)
        return fail(text)
    except ValueError as error:
        return fail(str(error))
    except KeyboardInterrupt:
        return fail("interrupted; finished shards stay valid: start again to go on")
    return 0


def fail(text: str) -> int:
    print(f"error: {one_line(text)}", file=sys.stderr)
    return 2


# ── the run ──────────────────────────────────────────────────────────────────────────────────────────────────────────


def run(args: argparse.Namespace) -> None:
    """Plan, pack, finalize. Raises ValueError or OSError with a line for the user."""
    from data_prep.packing import workers
    from data_prep.packing.output_folder import LOCKS, output_lock, prepare_output
    from data_prep.packing.plan import PLAN_FOLDER

    # Everything that can be wrong with the command, before any work.
    check_numbers(args)
    images = pack_flags.image_options(args)
    planning = pack_flags.plan_options(args)
    source = pack_flags.sources(args)
    if not args.dry_run:
        prepare_output(args.output_path)
    locks = args.output_path / PLAN_FOLDER / LOCKS
    held = contextlib.nullcontext() if args.dry_run else output_lock(locks, "packing", args.task_id, args.num_tasks)

    with held as lock, workers.Workers(args.num_workers) as pool:
        backend = pool.resize_backend() if args.resize == "auto" else args.resize
        images = dataclasses.replace(images, resize=backend)
        options = pack_flags.manifest_options(images, planning)
        job = workers.Job(os.fsencode(source.base), images, planning.remove_duplicates, args.image_column)
        if lock is None:
            from data_prep.packing.dry_run import dry_run
            from data_prep.packing.plan import PlanRows

            with tempfile.TemporaryDirectory() as folder:
                plan, _ = plan_for(source, Path(folder), pool, job, planning, options)
                dry_run(plan, PlanRows(Path(folder)), pool, job)
            return

        plan, touched = plan_for(source, args.output_path, pool, job, planning, options)
        print(summary(plan))
        check_failures(plan.failed, plan.inputs, args.max_failed_ratio, plan.examples)
        if not args.plan_only:
            pack(args, plan, touched, pool, job, lock)
            finish(args, plan, images.format, options, lock)


def check_numbers(args: argparse.Namespace) -> None:
    from data_prep.packing.workers import usable_cores

    if args.num_workers is None:
        args.num_workers = usable_cores()
    if args.num_workers < 0 or not 0 <= args.task_id < args.num_tasks:
        raise ValueError(
            f"--num_workers {args.num_workers} --task_id {args.task_id} --num_tasks {args.num_tasks}:"
            " needs num_workers >= 0 and 0 <= task_id < num_tasks"
        )
    if not 0 <= args.max_failed_ratio <= 1:
        raise ValueError(f"--max_failed_ratio {args.max_failed_ratio:g}: must be from 0 to 1")


def pack(args: argparse.Namespace, plan: Plan, touched: array[int], pool: Workers, job: Job, lock: FolderLock) -> None:
    """This task's shards that are not committed yet."""
    from data_prep.packing.differences import check_edits
    from data_prep.packing.pack import pack_shard, read_stats, stats_of
    from data_prep.packing.plan import PlanRows
    from data_prep.packing.progress import Progress

    out, rows = args.output_path, PlanRows(args.output_path)
    mine = range(args.task_id, len(plan.shard_rows), args.num_tasks)
    todo = [number for number in mine if read_stats(out, number, plan.fingerprint) is None]
    if len(todo) < len(mine):
        check_edits(plan, out, touched, sorted(set(mine) - set(todo)), pool, job)
        print(f"{len(mine) - len(todo)} of {len(mine)} shards are there already")
    if damaged := [number for number in todo if stats_of(out, number) is not None]:
        print(f"{len(damaged)} finished shards are damaged or incomplete, first {damaged[0]:06d}: packed again")
    failed = 0
    with Progress("pack", sum(plan.shard_rows[number] for number in todo)) as progress:
        for number in todo:
            lock.require()
            failed += pack_shard(out, number, rows.shard(number), pool, job, plan.fingerprint, progress)["failed"]
            progress.failed_before = failed
            check_failures(failed, plan.inputs, args.max_failed_ratio, plan.examples)


def finish(args: argparse.Namespace, plan: Plan, payload: str, options: dict[str, Any], lock: FolderLock) -> None:
    """Index and manifest, by whoever finds all shards there."""
    from data_prep.packing.finalize import finalize
    from data_prep.packing.pack import WARNED, read_stats

    out = args.output_path
    found = {number: read_stats(out, number, plan.fingerprint) for number in range(len(plan.shard_rows))}
    committed = {number: stats for number, stats in found.items() if stats is not None}
    if len(committed) < len(found):
        print(f"{len(found) - len(committed)} of {len(found)} shards are left to other tasks")
        return
    failed = sum(stats["failed"] for stats in committed.values())
    check_failures(failed, plan.inputs, args.max_failed_ratio, plan.examples)
    if not any(stats["samples"] for stats in committed.values()):
        raise ValueError(f"no image of {plan.inputs} could be used; {shown(out)}/*.parquet say why")
    lock.require()
    remarks: dict[str, Any] = {"remarks": plan.remarks, "ignored": plan.ignored}
    manifest = finalize(
        out,
        committed,
        payload=payload,
        fingerprint=plan.fingerprint,
        options=options,
        versions=plan.versions,
        remarks=remarks,
    )
    totals = manifest.totals
    print(
        f"{shown(out)}: {totals['samples']} samples in {len(manifest.shards)} shards, {len(manifest.buckets)} buckets,"
    )
    print(
        f"{totals['bytes'] / 1e6:.1f} MB, {totals['copied']} copied unchanged; {totals['filtered']} filtered, {failed} failed"
    )
    first: dict[str, str] = {}
    for number in sorted(committed):
        first = committed[number].get("first", {}) | first
    for reason, count in sorted(totals["reasons"].items(), key=lambda item: -item[1]):
        print(f"  {count:>8}  {reason}; first {shown(first.get(reason, '?'), 400)}")
    for line in [*pair_lines(totals, options), *mask_lines(totals, first)]:
        print(line)
    if totals["warned"]:
        print(f"  {totals['warned']:>8}  packed, but their decoder warned; first {shown(first.get(WARNED, '?'), 400)}")


def plan_for(
    source: Sources, folder: Path, pool: Workers, job: Job, planning: PlanOptions, options: dict[str, Any]
) -> tuple[Plan, array[int]]:
    """The plan of these inputs and options: the one in the folder if there is one, else a new one.

    With it come the row numbers of inputs whose files changed in some way since, by their times.
    """
    from data_prep.packing import plan as plans
    from data_prep.packing.differences import check_inputs
    from data_prep.packing.plan_lines import reasons_line
    from data_prep.packing.progress import Progress

    plan = plans.read_plan(folder)
    if plan is not None:
        return plan, check_inputs(plan, options, folder, source)
    with plans.rebuilt_if_damaged(folder) as place, Progress("plan", None) as progress:
        plan = plans.make_plan(source, place, pool, job, planning, options, pack_flags.versions(), progress)
    if not plan.samples:
        plans.plan_file(folder).unlink()
        raise ValueError(
            f"none of {plan.inputs} images can be used: {reasons_line(plan)}" if plan.inputs else nothing_found(source)
        )
    return plan, array("q")


def check_failures(failed: int, inputs: int, ratio: float, examples: list[str]) -> None:
    if failed > ratio * inputs:
        first = f"; first {shown(examples[0], 400)}" if examples else ""
        raise ValueError(f"{failed} of {inputs} inputs failed, more than --max_failed_ratio {ratio:g}{first}")


def pair_lines(totals: dict[str, Any], options: dict[str, Any]) -> list[str]:
    """What to say of the pairs of a finished set: how many, and where training would see what inference does not do."""
    from qwen_image.model.family import SOURCE_AREA

    if not totals.get("pairs"):
        return []
    said = [f"  {totals['pairs']:>8}  are pairs: targets of edits with their source images"]
    if totals["reshaped"]:
        said.append(
            f"  {totals['reshaped']:>8}  pairs whose target has another shape than its source images; inference takes the size"
            " of what it makes from one of them"
        )
    targets = [options["fixed"]] if options["fixed"] else [area for area in options["areas"] if area != SOURCE_AREA]
    if targets:
        sizes = ", ".join("x".join(map(str, t)) if isinstance(t, list) else f"about {t} pixels" for t in targets)
        said.append(f"  note: targets of {sizes}; inference makes about {SOURCE_AREA}: of another scale")
    if (area := options.get("source_pixels", SOURCE_AREA)) != SOURCE_AREA:
        said.append(
            f"  note: source images of about {area} pixels, inference has {SOURCE_AREA}: --source_pixels for sampling too"
        )
    return said


def mask_lines(totals: dict[str, Any], first: dict[str, str]) -> list[str]:
    """What to say of the masks of a finished set: how many, images without, masks that say nothing."""
    from data_prep.packing.pack import BLACK, TURNED

    masked = totals.get("masked", 0)
    if not masked:
        return []
    said = [f"  {masked:>8}  have a mask: train_lora.py --masked_loss learns what is white in it"]
    if whole := totals["samples"] - masked:
        said.append(f"  {whole:>8}  have none: all of the image counts (--on_missing_mask)")
    if black := totals.get("black_masks"):
        said.append(
            f"  {black:>8}  warning: masks are black where the image was kept, and count as if they were not there; first "
            f"{shown(first.get(BLACK, '?'), 400)}"
        )
    if turned := totals.get("turned_masks"):
        said.append(
            f"  {turned:>8}  masks were turned by their image's orientation, which they don't tell; first "
            f"{shown(first.get(TURNED, '?'), 400)}"
        )
    return said


# ── what is printed ──────────────────────────────────────────────────────────────────────────────────────────────────


def nothing_found(source: Sources) -> str:
    from data_prep.images.formats import EXTENSIONS

    if source.empty_listings:
        return f"{shown(source.empty_listings[0])} lists no images (its first line must name the columns)"
    kinds = ", ".join(f"{count} {shown(kind) or 'without'}" for kind, count in source.ignored.most_common(5))
    remarks = "; ".join(source.remarks.lines())
    return (
        f"no images in {shown(source.base)}: {source.files_seen} files seen{f' ({kinds})' if kinds else ''},"
        f" looked for .{' .'.join(sorted(EXTENSIONS))}, .tar, .parquet with images and metadata.csv|jsonl|json|parquet"
        + (f"; {remarks}" if remarks else "")
    )


def summary(plan: Plan) -> str:
    """The plan in a few lines: what goes in, what was left out and why."""
    from data_prep.packing.plan_lines import lines

    head = f"{plan.inputs} inputs: {plan.samples} to pack into {len(plan.shard_rows)} shards of {len(plan.buckets)} buckets,"
    return "\n".join([f"{head} about {plan.expected_bytes / 1e6:.1f} MB", *lines(plan)])


if __name__ == "__main__":
    sys.exit(main())
