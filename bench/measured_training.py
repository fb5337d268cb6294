"""train_lora.py in a process of its own, watched: what its steps took, compilation, CUDA graphs, memory, idle GPU.

    python bench/measured_training.py --runs runs.json --results results.jsonl
    deepspeed --num_gpus 1 bench/measured_training.py --runs runs.json --results results.jsonl --profiled 4

runs.json is a list of train_lora.py's flags for each run: [["--deepspeed", "ds_configs/zero2.json", "--model", …], …]. Runs
follow each other in the process as long as the one before left no memory behind. A row for each goes to the results.
Nothing waits for the GPU: events on its own clock tell when each step ended; the profiler watches only the last steps.
"""

import argparse
import gc
import json
import os
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
LEFT_BYTES = 1 << 30  # more than this left by a run, and the next one wants a new process


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=Path, required=True, help="JSON: a list of lists of train_lora.py's flags")
    parser.add_argument("--results", type=Path, required=True, help="a JSON object a line for each run that ended")
    parser.add_argument("--profiled", type=int, default=0, help="so many last steps are profiled, on a GPU (default 0)")
    parser.add_argument("--hollow", action="store_true", help="the model's files hold no weights: draw them (demo/)")
    parser.add_argument("--until", type=float, help="begin no run after this time (seconds since 1970)")
    parser.add_argument("--local_rank", help=argparse.SUPPRESS)  # the launcher passes it
    options = parser.parse_args(argv)
    runs = json.loads(options.runs.read_text())
    for number, flags in enumerate(runs):
        if number and options.until is not None and time.time() > options.until:
            break
        result = watched(flags, options.profiled, options.hollow, another_follows=number + 1 < len(runs))
        with options.results.open("a") as file:
            file.write(json.dumps(result) + "\n")
        if result["rank"] == 0:
            print(f"measured: {summary(result)}", flush=True)
        if result.get("left_gib", 0.0) > LEFT_BYTES / 2**30:
            break
    return 0


def watched(
    flags: Sequence[str], profiled: int = 0, hollow: bool = False, another_follows: bool = False
) -> dict[str, Any]:
    """Run train_lora.py with `flags` in this process and say what it took. Seconds and GiB; see Watch.result."""
    import torch

    from bench.random_transformer import drawn_instead_of_read
    from bench.run_watch import Watch
    from train import train_lora
    from train.config.command_line import parse

    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    watch = Watch(parse(list(flags)).max_steps or 0, profiled)
    start = time.perf_counter()
    with watch.installed(), drawn_instead_of_read() if hollow else nullcontext():
        code = train_lora.main(list(flags))
    rank = int(os.environ.get("RANK", "0"))
    result = {"code": code, "rank": rank, "seconds": time.perf_counter() - start, **watch.result()}
    if another_follows:
        watch.release()
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
            result["left_gib"] = torch.cuda.memory_allocated() / 2**30
    return result


def summary(result: dict[str, Any]) -> str:
    """A run's numbers on one line of JSON, with `step_seconds` instead of all steps."""
    short = {"step_seconds": step_seconds(result), **result}
    return json.dumps({name: value for name, value in short.items() if name != "steps"})


# ── for other scripts ────────────────────────────────────────────────────────────────────────────────────────────────


def settled(result: dict[str, Any] | None, after: int) -> list[dict[str, Any]]:
    """The steps from number `after` on (from 0) that nothing was compiled, captured or profiled in."""
    assert result is not None
    return [
        step
        for step in result["steps"][max(after, 1) :]
        if not step["profiled"] and not step["captures"] and not step["compile_seconds"]
    ]


def step_seconds(result: dict[str, Any]) -> float | None:
    """Median seconds of the settled steps from number 2 on; None where there is none."""
    seconds = [step["seconds"] for step in settled(result, 2)]
    return statistics.median(seconds) if seconds else None


def measure_runs(
    runs: Sequence[Sequence[str]],
    *,
    profiled: int = 0,
    hollow: bool = False,
    launcher: str = "python",
    gpus: int = 1,
    until: float | None = None,
) -> list[dict[str, Any] | None]:
    """A result for each of `runs` (train_lora.py's flags), in as few new processes as do; None: it failed, or time was up.

    On several `gpus` (under deepspeed; CPU ranks where there are none) it is rank 0's, with the host memory of all.
    """
    results: list[dict[str, Any] | None] = []
    with tempfile.TemporaryDirectory() as folder:
        while len(results) < len(runs):
            if until is not None and time.time() > until:
                return results + [None] * (len(runs) - len(results))
            todo, rows = Path(folder) / "runs.json", Path(folder) / f"results-{len(results)}.jsonl"
            todo.write_text(json.dumps(runs[len(results) :]))
            command = [sys.executable, __file__]
            if launcher == "deepspeed":
                with socket.socket() as free:
                    free.bind(("127.0.0.1", 0))
                    port = free.getsockname()[1]
                beside = Path(sys.executable).with_name("deepspeed")
                command = [str(beside if beside.exists() else "deepspeed"), "--num_gpus", str(gpus)]
                command += ["--master_port", str(port), __file__]
            command += ["--runs", str(todo), "--results", str(rows), "--profiled", str(profiled)]
            command += ["--hollow"] * hollow + (["--until", str(until)] if until is not None else [])
            failed = False
            try:
                run(command)
            except RuntimeError as error:
                print(error, flush=True)
                failed = True
            lines = rows.read_text().splitlines() if rows.exists() else []
            done = of_rank_0([json.loads(line) for line in lines])
            results += [row if row["code"] == 0 else None for row in done]
            if (failed or not done) and len(results) < len(runs):
                results.append(None)
    return results


def of_rank_0(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Each run's row of rank 0, the host memory of all its ranks added up."""
    found = [row for row in rows if row["rank"] == 0]
    for number, row in enumerate(found):
        runs = [[r for r in rows if r["rank"] == rank] for rank in {r["rank"] for r in rows}]
        row["host_gib"] = sum(of_rank[number]["host_gib"] for of_rank in runs if len(of_rank) > number)
    return found


def run(command: list[str]) -> str:
    """What a command prints; its standard error goes to ours. Raises RuntimeError when it fails."""
    paths = [str(ROOT), os.environ.get("PYTHONPATH", "")]
    environment: dict[str, Any] = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, paths))}
    lines = []
    with subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        for line in process.stdout:
            print("    " + line, end="", flush=True)
            lines.append(line)
    if process.returncode != 0:
        raise RuntimeError(f"exit code {process.returncode}: {' '.join(command[:3])} …")
    return "".join(lines)


if __name__ == "__main__":
    code = main()
    if "train.process.ranks" in sys.modules:
        sys.modules["train.process.ranks"].leave_process_group()
    sys.exit(code)
