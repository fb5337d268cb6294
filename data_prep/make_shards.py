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
import dataclasses
import errno
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


def main(argv: list[str] | None = None) -> int:
    args = pack_flags.parse(argv, __doc__)
    tolerant_output()
    try:
        run(args)
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            text = f"the disk of {args.output_path} is full; finished shards stay valid: make room and start again"
        else:
            text = f"{error.strerror}: {error.filename}" if error.filename and error.strerror else str(error)
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
    """Plan, pack, finalise. Raises ValueError or OSError with a line for the user."""
    from data_prep.packing import workers
    from data_prep.packing.differences import check_edits
    from data_prep.packing.finalize import finalise
    from data_prep.packing.pack import pack_shard, read_stats
    from data_prep.packing.plan import PlanRows
    from data_prep.packing.progress import Progress

    # Everything that can be wrong with the command, before any work.
    if args.num_workers is None:
        args.num_workers = workers.usable_cores()
    if args.num_workers < 0 or not 0 <= args.task_id < args.num_tasks:
        raise ValueError(
            f"--num_workers {args.num_workers} --task_id {args.task_id} --num_tasks {args.num_tasks}:"
            " needs num_workers >= 0 and 0 <= task_id < num_tasks"
        )
    if not 0 <= args.max_failed_ratio <= 1:
        raise ValueError(f"--max_failed_ratio {args.max_failed_ratio:g}: must be from 0 to 1")
    images = pack_flags.image_options(args)
    planning = pack_flags.plan_options(args)
    source = pack_flags.sources(args)
    if not args.dry_run:
        prepare_output(args.output_path)

    with workers.Workers(args.num_workers) as pool:
        backend = pool.resize_backend() if args.resize == "auto" else args.resize
        images = dataclasses.replace(images, resize=backend)
        options = pack_flags.manifest_options(images, planning)
        job = workers.Job(str(source.base).encode("utf-8", "surrogateescape"), images, planning.remove_duplicates)
        if args.dry_run:
            from data_prep.packing.dry_run import dry_run

            with tempfile.TemporaryDirectory() as folder:
                plan, _ = plan_for(source, Path(folder), pool, job, planning, options)
                dry_run(plan, PlanRows(Path(folder)), pool, job)
            return

        # Plan.
        out = args.output_path
        plan, touched = plan_for(source, out, pool, job, planning, options)
        print(summary(plan, source))
        check_failures(plan.failed, plan.inputs, args.max_failed_ratio, plan.examples)
        if args.plan_only:
            return

        # Pack.
        rows = PlanRows(out)
        mine = range(args.task_id, len(plan.shard_rows), args.num_tasks)
        todo = [number for number in mine if read_stats(out, number, plan.fingerprint) is None]
        if len(todo) < len(mine):
            check_edits(plan, out, touched, sorted(set(mine) - set(todo)), pool, job)
            print(f"{len(mine) - len(todo)} of {len(mine)} shards are there already")
        with Progress("pack", sum(plan.shard_rows[number] for number in todo)) as progress:
            for number in todo:
                stats = pack_shard(out, number, rows.shard(number), pool, job, plan.fingerprint, progress)
                progress.failed_before += stats["failed"]
                check_failures(progress.failed_before, plan.inputs, args.max_failed_ratio, plan.examples)

    # Finalise: whoever finds all shards there.
    committed = {number: read_stats(out, number, plan.fingerprint) for number in range(len(plan.shard_rows))}
    stats_of = {number: stats for number, stats in committed.items() if stats is not None}
    if len(stats_of) < len(committed):
        print(f"{len(committed) - len(stats_of)} of {len(committed)} shards are left to other tasks")
        return
    failed = sum(stats["failed"] for stats in stats_of.values())
    check_failures(failed, plan.inputs, args.max_failed_ratio, plan.examples)
    if not any(stats["samples"] for stats in stats_of.values()):
        raise ValueError(f"no image of {plan.inputs} could be used; {out}/*.parquet say why")
    manifest = finalise(
        out, stats_of, payload=images.format, fingerprint=plan.fingerprint, options=options, versions=plan.versions
    )
    totals = manifest.totals
    print(f"{out}: {totals['samples']} samples in {len(manifest.shards)} shards, {len(manifest.buckets)} buckets,")
    print(
        f"{totals['bytes'] / 1e6:.1f} MB, {totals['copied']} copied unchanged; {totals['filtered']} filtered, {failed} failed"
    )
    for reason, count in sorted(totals["reasons"].items(), key=lambda item: -item[1]):
        print(f"  {count:>8}  {reason}")


def plan_for(
    source: Sources, folder: Path, pool: Workers, job: Job, planning: PlanOptions, options: dict[str, Any]
) -> tuple[Plan, array[int]]:
    """The plan of these inputs and options: the one in the folder if there is one, else a new one.

    With it come the row numbers of inputs whose files changed in some way since, by their times.
    """
    from data_prep.packing import plan as plans
    from data_prep.packing.differences import check_inputs
    from data_prep.packing.progress import Progress

    plan = plans.read_plan(folder)
    if plan is not None:
        return plan, check_inputs(plan, options, folder, source)
    with Progress("plan", None) as progress:
        plan = plans.make_plan(source, folder, pool, job, planning, options, pack_flags.versions(), progress)
    if not plan.samples:
        plans.plan_file(folder).unlink()
        reasons = ", ".join(f"{count} {reason}" for reason, count in plan.reasons.items())
        raise ValueError(
            f"none of {plan.inputs} images can be used: {reasons}" if plan.inputs else nothing_found(source)
        )
    return plan, array("q")


def check_failures(failed: int, inputs: int, ratio: float, examples: list[str]) -> None:
    if failed > ratio * inputs:
        first = f"; first {shown(examples[0])}" if examples else ""
        raise ValueError(f"{failed} of {inputs} inputs failed, more than --max_failed_ratio {ratio:g}{first}")


def prepare_output(folder: Path) -> None:
    """Make the output folder and see that files can be written there. Raises ValueError or OSError."""
    from data_prep.packing.plan import PLAN_FOLDER, read_plan
    from data_prep.shard_format.shards import MANIFEST
    from files.atomic_files import remove_abandoned, write_file

    if folder.exists() and not folder.is_dir():
        raise ValueError(f"--output_path {folder}: is a file, not a folder")
    try:
        (folder / PLAN_FOLDER).mkdir(parents=True, exist_ok=True)
        probe = folder / PLAN_FOLDER / ".writable"
        write_file(probe, b"")
        probe.unlink(missing_ok=True)
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise
        raise ValueError(f"--output_path {folder}: cannot be written to ({error.strerror})") from None
    if (folder / MANIFEST).exists() and read_plan(folder) is None:
        raise ValueError(
            f"--output_path {folder} holds a data set that this program did not make: choose another folder"
        )
    remove_abandoned(folder)
    remove_abandoned(folder / PLAN_FOLDER)


# ── what is printed ──────────────────────────────────────────────────────────────────────────────────────────────────


def nothing_found(source: Sources) -> str:
    from data_prep.sources.find_inputs import IMAGE_EXTENSIONS

    if source.empty_listings:
        return f"{source.empty_listings[0]} lists no images"
    kinds = ", ".join(f"{count} {shown(extension or 'without')}" for extension, count in source.ignored.most_common(5))
    return (
        f"no images in {source.base}: {source.files_seen} files seen{f' ({kinds})' if kinds else ''},"
        f" looked for .{' .'.join(sorted(IMAGE_EXTENSIONS))}, .tar and metadata.csv|jsonl|json|parquet"
    )


def summary(plan: Plan, source: Sources) -> str:
    """The plan in a few lines: what goes in, what was left out and why."""
    lines = [
        f"{plan.inputs} inputs: {plan.samples} to pack into {len(plan.shard_rows)} shards of {len(plan.buckets)} buckets,"
        f" about {plan.expected_bytes / 1e6:.1f} MB"
    ]
    lines += [f"  {count:>8}  {reason}" for reason, count in sorted(plan.reasons.items(), key=lambda item: -item[1])]
    lines += [f"            {shown(example)}" for example in plan.examples]
    if source.ignored:
        ignored = ", ".join(
            f"{count} {shown(extension or 'no extension')}" for extension, count in source.ignored.most_common(8)
        )
        lines.append(f"  files that are neither images nor captions: {ignored}")
    if stems := source.duplicate_stems:
        lines.append(
            f"  warning: {len(stems)} images share their name and caption with another, first {shown(stems[0])}"
        )
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
