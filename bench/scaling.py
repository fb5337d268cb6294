"""How training scales over the GPUs of one host, through the real command: ZeRO-2 and stage 3, one table.

    python bench/scaling.py --folder /dev/shm/scaling                          # 1, 2, 4, 8 GPUs, as many as there are
    python bench/scaling.py --folder /dev/shm/scaling --ranks 1,2 --cases zero2,zero3 --out scaling.json
    python bench/scaling.py --folder /tmp/scaling --tiny --ranks 1,2,4,8       # CPU ranks: to try the script

A case is a DeepSpeed JSON with flags (CASES); each runs on each number of ranks, a launch each. The batch of a rank stays
the same, so that images a second over those of one rank, divided by the ranks, is the efficiency (weak scaling).
`collectives` is the time that rank 0's GPU has an NCCL kernel at work, waiting for other ranks included, as a share of a
profiled step. `curves` holds the global batch instead: the same micro-batches on all numbers of ranks, whose losses must agree.

The model (41 GB) is written once into --folder and stays there. A line is printed after each run, so a script that is stopped
has told what it knew.
"""

from __future__ import annotations

import argparse
import json
import shutil
import statistics
import sys
from pathlib import Path
from typing import Any, NamedTuple

from bench.measured_training import measure_runs, settled
from bench.out_file import out_file, write_numbers
from bench.real_command import LONGEST, SHORTEST, TEXT, mixed_sizes
from bench.start_up import metrics, prepare

ROOT = Path(__file__).resolve().parent.parent
WARM_UP, TIMED, PROFILED = 4, 20, 4  # steps
CURVE_STEPS = 10


class Case(NamedTuple):
    """What is run: a JSON of ds_configs, further flags, and data of one bucket or of ten with prompts of all lengths."""

    config: str
    flags: tuple[str, ...] = ()
    mixed: bool = False


CASES = {
    "zero2": Case("zero2"),
    "zero2-float8": Case("zero2", ("--base_precision", "float8")),
    "zero2-mixed": Case("zero2", mixed=True),
    "zero3": Case("zero3"),
    "zero3-recomputed": Case("zero3", ("--activation_checkpointing", "full")),
    "curves": Case("zero2", ("--lr_warmup_steps", "0", "--learning_rate", "1e-3")),
}
Row = dict[str, Any]


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, required=True, help="for model, data and runs; the model stays")
    parser.add_argument("--ranks", help="comma list (default: of 1, 2, 4, 8 what there are GPUs for)")
    parser.add_argument("--cases", default=",".join(CASES), help=f"comma list of {', '.join(CASES)} (default: all)")
    parser.add_argument("--steps", type=int, default=WARM_UP + TIMED, help=f"of each run ({WARM_UP + TIMED})")
    parser.add_argument("--tiny", action="store_true", help="2 narrow blocks, 64 pixels: on CPU ranks too")
    parser.add_argument("--out", type=out_file, help="JSON file for all numbers")
    options = parser.parse_args(argv)
    cases = options.cases.split(",")
    if unknown := set(cases) - set(CASES):
        parser.error(f"--cases {', '.join(sorted(unknown))}: choose from {', '.join(CASES)}")
    if options.steps <= WARM_UP:
        parser.error(f"--steps {options.steps}: {WARM_UP} don't count, so give more")
    try:
        ranks = ranks_to_run(options.ranks, options.tiny)
    except ValueError as error:
        parser.error(str(error))
    prepare(options.folder, options.tiny)
    rows: list[Row] = []
    for name in cases:
        for world in ranks:
            rows.append(run(options, name, world, max(ranks)))
            print("measured: " + json.dumps({k: v for k, v in rows[-1].items() if k != "losses"}), flush=True)
            if options.out:
                write_numbers(options.out, {"ranks": ranks, "tiny": options.tiny, "rows": rows})
    print(table(rows))
    return int(any("failed" in row for row in rows))


def ranks_to_run(given: str | None, tiny: bool) -> list[int]:
    """The numbers of ranks, ascending. Raises ValueError for what can't be run here."""
    import torch

    gpus = torch.cuda.device_count()
    if given is None:
        found = [count for count in (1, 2, 4, 8) if count <= gpus]
        if not found:
            raise ValueError("there is no GPU here: --tiny --ranks 1,2 tries the script on CPU ranks")
        return found
    if not all(part.isdecimal() and int(part) > 0 for part in given.split(",")):
        raise ValueError(f"--ranks {given}: give counts such as 1,2,4")
    ranks = sorted({int(part) for part in given.split(",")})
    if ranks[-1] > gpus and not (tiny and not gpus):
        raise ValueError(f"--ranks {given}: there are {gpus} GPUs here")
    return ranks


def run(options: argparse.Namespace, name: str, world: int, most: int) -> Row:
    """One launch of the real command; `most`: ranks of the largest run, whose global batch `curves` keeps everywhere."""
    case, folder = CASES[name], options.folder
    output, data = folder / "run", folder / "data"
    steps = options.steps + PROFILED
    more: list[str] = []
    if case.mixed:
        data = mixed_data(folder, options.tiny)
        steps = max(steps, 2 * -(-len(mixed_sizes(1024)) * 3 // world))  # two epochs: each batch was met before
    if name == "curves":
        steps, more = CURVE_STEPS, ["--gradient_accumulation_steps", str(most // world)]
        if most % world:
            return {"case": name, "ranks": world, "failed": f"{most} micro-batches don't divide by {world} ranks"}
    shutil.rmtree(output, ignore_errors=True)
    flags = ["--deepspeed", str(ROOT / "ds_configs" / f"{case.config}.json"), "--model", str(folder / "model")]
    flags += ["--data", str(data), "--output_path", str(output), "--max_steps", str(steps), "--save_steps", "0"]
    flags += ["--wandb_mode", "disabled", "--log_steps", "1", "--report", "off", *case.flags, *more]
    if not options.tiny:
        flags += ["--cuda_graphs", "on"]  # a real run is long enough to choose them by itself
    profiled = 0 if name == "curves" else PROFILED
    (result,) = measure_runs([flags], profiled=profiled, launcher="deepspeed", gpus=world)
    if result is None:
        return {"case": name, "ranks": world, "failed": "the run failed: its own words stand above"}
    logged = metrics(output / "metrics.jsonl")
    losses = [row["loss"] for row in logged if "loss" in row]
    return {"case": name, "ranks": world, **numbers(result, logged, world, case.mixed), "losses": losses}


def numbers(result: Row, logged: list[Row], world: int, mixed: bool) -> Row:
    """Of one run: seconds a step, images a second of all ranks, and what stands beside them in the table."""
    steps = settled(result, WARM_UP)
    seconds = [step["seconds"] for step in (steps[len(steps) // 2 :] if mixed else steps)]
    middle = statistics.mean(seconds) if mixed else statistics.median(seconds)
    profile = result.get("profile") or {}
    start: dict[str, float] = next((row["start"] for row in logged if "start" in row), {})
    return {
        "seconds": round(middle, 4),
        "images_per_second": round(world / middle, 3),
        "collectives": round(profile["collectives"] / profile["wall"], 4) if profile else None,
        "gpu_gib": round(result["gpu_gib"], 2) if "gpu_gib" in result else None,
        "host_gib": round(result["host_gib"], 1),
        "start": round(sum(start.values()), 1),
    }


def mixed_data(folder: Path, tiny: bool) -> Path:
    """Ten buckets of one area, three samples each, prompts of 5 to 500 tokens; unless it is there."""
    import random

    from demo.random_model import write_random_encoded

    data = folder / "mixed"
    if not data.exists():
        scale = 16 if tiny else 1
        sizes = mixed_sizes(1024 // scale)
        draw = random.Random(0)
        lengths = [
            draw.randint(SHORTEST, (TEXT if tiny else LONGEST) // scale + SHORTEST) for _ in range(3 * len(sizes))
        ]
        write_random_encoded(data, len(lengths), 0, 0, lengths, 64 if tiny else 3584, sizes)
    return data


def table(rows: list[Row]) -> str:
    """Markdown, a line a run; and how far the losses of `curves` lie apart."""
    lines = [
        "",
        "| case | ranks | s a step | images/s | efficiency | collectives | GiB | host GiB | first step at, s |",
    ]
    lines.append("| --- | --- | --- | --- | --- | --- | --- | --- | --- |")
    for row in rows:
        if "failed" in row:
            lines.append(f"| {row['case']} | {row['ranks']} | {row['failed']} | | | | | | |")
            continue
        if row["case"] == "curves":
            continue
        one = next((r for r in rows if r["case"] == row["case"] and r["ranks"] == 1 and "failed" not in r), None)
        efficient = f"{row['images_per_second'] / one['images_per_second'] / row['ranks']:.1%}" if one else "–"
        share = "–" if row["collectives"] is None else f"{row['collectives']:.1%}"
        gib = "–" if row["gpu_gib"] is None else f"{row['gpu_gib']:.2f}"
        cells = (
            row["case"],
            row["ranks"],
            f"{row['seconds']:.4f}",
            f"{row['images_per_second']:.2f}",
            efficient,
            share,
            gib,
        )
        lines.append(f"| {' | '.join(map(str, cells))} | {row['host_gib']:.1f} | {row['start']:.1f} |")
    curves = [row for row in rows if row["case"] == "curves" and "failed" not in row]
    if len(curves) > 1:
        first, *others = curves
        for other in others:
            apart = max(abs(a - b) / abs(a) for a, b in zip(first["losses"], other["losses"], strict=True))
            lines.append(
                f"\n{len(first['losses'])} losses of one global batch on {first['ranks']} and {other['ranks']} ranks: at most "
                f"{apart:.1e} apart"
            )
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
