"""The report of a run, or of several side by side, as one HTML file.

    python train/report.py RUN
    python train/report.py runs/rank8 runs/rank16 --output compared.html

A run writes its own at its end (RUN/report.html); this makes one of any run at any time: of one that is still going, was
broken off, or ended on another machine. The file needs nothing else, no network and no account. Exit code 2: RUN is no run.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from files.shown import one_line, shown, tolerant_output


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="report.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("runs", nargs="+", type=Path, metavar="RUN", help="run folder, what --output_path named")
    parser.add_argument(
        "--output", type=Path, help="HTML file to write (not given: RUN/report.html, of several runs ./report.html)"
    )
    parser.add_argument(
        "--pictures", type=int, default=160, help="sample images on the page, all runs together (default: %(default)s)"
    )
    return parser


def main(argv: list[str] | None = None) -> int:
    tolerant_output()
    arguments = build_parser().parse_args(argv)
    try:
        report(arguments)
    except (ValueError, OSError) as error:
        print(f"error: {one_line(error)}", file=sys.stderr)
        return 2
    return 0


def report(arguments: argparse.Namespace) -> None:
    """Read the runs, write the page, say where it is. Raises FileNotFoundError for what is no run."""
    from train.reporting.run_record import read_run
    from train.reporting.run_report import REPORT, write_report

    if arguments.pictures < 0:
        raise ValueError(f"--pictures must be at least 0, got {arguments.pictures}")
    folders = [folder.expanduser() for folder in arguments.runs]
    runs = [read_run(folder) for folder in folders]
    output = arguments.output or (folders[0] / REPORT if len(folders) == 1 else Path(REPORT))
    if not output.absolute().parent.is_dir():
        raise FileNotFoundError(f"--output {shown(output)}: no folder {shown(output.absolute().parent)}")
    for run in runs:
        for remark in run.remarks:
            print(f"{shown(run.folder)}: {one_line(remark)}")
    write_report(output, runs, arguments.pictures)
    print(f"report: {shown(output)}")


if __name__ == "__main__":
    sys.exit(main())
