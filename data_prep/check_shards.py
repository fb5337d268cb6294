"""Verify every shard of a data set; optionally write a report of it as one HTML file.

    python data_prep/check_shards.py shards
    python data_prep/check_shards.py shards --report report.html
    python data_prep/check_shards.py encoded --quick

Exit code 0: everything agrees. 1: something is wrong, each on a line of standard error. 2: there is no data set.
"""

from __future__ import annotations

import argparse
import sys
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

from files.shown import one_line, shown, tolerant_output

SHOWN = 20  # problems that are printed, and listed in the report


def parse_arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="check_shards.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("shards", type=Path, help="folder made by make_shards.py or encode_shards.py")
    parser.add_argument("--report", type=Path, help="HTML file to write")
    parser.add_argument("--quick", action="store_true", help="hashes, members and index only; decode nothing")
    parser.add_argument("--num_workers", type=int, help="processes; 0 works in this one (default: one a core)")
    parser.add_argument("--pictures", type=int, default=48, help="in the report's contact sheet (default: %(default)s)")
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> int:
    tolerant_output()
    args = parse_arguments(argv)
    try:
        problems = check(args)
    except (ValueError, OSError) as error:
        print(f"error: {one_line(error)}", file=sys.stderr)
        return 2
    for problem in problems[:SHOWN]:
        print(f"error: {one_line(problem)}", file=sys.stderr)
    if len(problems) > SHOWN:
        print(f"error: and {len(problems) - SHOWN} more", file=sys.stderr)
    return 1 if problems else 0


def check(args: argparse.Namespace) -> list[str]:
    """Check all shards, print the totals, write the report; return what is wrong."""
    from data_prep.checking import verify
    from data_prep.packing.progress import Progress
    from data_prep.packing.workers import usable_cores
    from data_prep.shard_format.shards import read_manifest

    manifest = read_manifest(args.shards)
    if args.report and not args.report.absolute().parent.is_dir():
        raise FileNotFoundError(f"--report {args.report}: no folder {args.report.absolute().parent}")
    count = usable_cores() if args.num_workers is None else args.num_workers
    problems = verify.check_folder(args.shards, manifest)
    tasks = [(args.shards, manifest, position, not args.quick) for position in range(len(manifest.shards))]
    with Progress("check", sum(shard.samples for shard in manifest.shards)) as progress:
        if count and len(tasks) > 1:
            import multiprocessing

            with ProcessPoolExecutor(min(count, len(tasks)), mp_context=multiprocessing.get_context("spawn")) as pool:
                found = pool.map(verify.check_shard, *zip(*tasks, strict=True))
                for shard, its_problems in zip(manifest.shards, found, strict=True):
                    progress.update(shard.samples)
                    problems += its_problems
        else:
            for task in tasks:
                problems += verify.check_shard(*task)
                progress.update(manifest.shards[task[2]].samples)
    samples = sum(shard.samples for shard in manifest.shards)
    print(f"{shown(args.shards)}: {samples} {manifest.payload} samples in {len(manifest.shards)} shards")
    for bucket in manifest.buckets:
        sources = "".join(f"  + {width} x {height}" for width, height in bucket.sources)
        print(f"  {bucket.width:>5} x {bucket.height:<5} {bucket.count:>9}{sources}")
    print("everything agrees" if not problems else f"{len(problems)} problem{'s' * (len(problems) > 1)}")
    if args.report:
        from data_prep.checking.report import write_report

        try:
            write_report(args.report, args.shards, manifest, problems[:SHOWN], len(problems), args.pictures)
            print(f"report: {shown(args.report)}")
        except ValueError as error:  # an index that cannot be read
            problems.append(f"no report: {error}")
    return problems


if __name__ == "__main__":
    sys.exit(main())
