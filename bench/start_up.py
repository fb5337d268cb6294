"""From the command to the first step, piece by piece: the real command on a full-size random model, cold and warm.

    python bench/start_up.py --folder /dev/shm/start_up --gpus 1                   # compiler caches empty, then filled twice
    python bench/start_up.py --folder /dev/shm/start_up --gpus 4 --configs zero2,zero3 --runs cold,warm
    python bench/start_up.py --folder /tmp/start_up --gpus 1 --tiny                # to try the script

The model (41 GB) is written once into --folder and stays there: in a tmpfs its files are in memory, on a disk they are in
the page cache unless `--drop` asks for a file's pages to be given back first. Pieces are the run's own row `start`
(train/process/start_clock.py); `outside` is what the command took before and after that.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from bench.out_file import out_file, write_numbers

ROOT = Path(__file__).resolve().parent.parent
CONFIGS = ROOT / "ds_configs"


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, required=True, help="for model, data and runs; the model stays")
    parser.add_argument("--gpus", type=int, default=1, help="ranks (default 1)")
    parser.add_argument("--configs", default="zero2", help="comma list of ds_configs' names (default zero2)")
    parser.add_argument("--runs", default="cold,warm,warm", help="comma list of cold (no compiler caches) and warm")
    parser.add_argument("--launcher", choices=("deepspeed", "torchrun", "python"), default="deepspeed")
    parser.add_argument("--steps", type=int, default=20, help="of each run (default 20)")
    parser.add_argument("--flags", default="", help="further flags of train_lora.py, such as '--base_precision float8'")
    parser.add_argument(
        "--drop", action="store_true", help="ask the system to forget the model's pages before each run"
    )
    parser.add_argument("--py_spy", action="store_true", help="where Python is, at 20 Hz, into FOLDER/*.speedscope")
    parser.add_argument("--tiny", action="store_true", help="2 narrow blocks, 64 pixels: to try the script")
    parser.add_argument("--out", type=out_file, help="JSON file for all numbers")
    options = parser.parse_args(argv)
    prepare(options.folder, options.tiny)
    rows: list[dict[str, Any]] = []
    for config in options.configs.split(","):
        for kind in options.runs.split(","):
            row = {"config": config, "kind": kind} | run(options, config, cold=kind == "cold", number=len(rows))
            rows.append(row)
            print(json.dumps(row), flush=True)
            if options.out:
                write_numbers(options.out, {"gpus": options.gpus, "flags": options.flags, "rows": rows})
    print(table(rows))
    return int(any("failed" in row for row in rows))


def prepare(folder: Path, tiny: bool) -> None:
    """The model and the encoded shards, unless they are there."""
    from demo.random_model import write_random_encoded, write_random_model

    side, text_dim = (64, 64) if tiny else (1024, 3584)
    if not (folder / "model").exists():
        start = time.perf_counter()
        write_random_model(folder / "model", *((2, 2, 64) if tiny else ()))
        print(f"model written in {time.perf_counter() - start:.0f} s", flush=True)
    if not (folder / "data").exists():
        write_random_encoded(folder / "data", 64, side, side, 128, text_dim)


def run(options: argparse.Namespace, config: str, cold: bool, number: int) -> dict[str, Any]:
    """One run of the command; its pieces in seconds, or what it said last when it failed."""
    folder: Path = options.folder
    if cold:
        shutil.rmtree(folder / "caches", ignore_errors=True)
    if options.drop:
        for path in (folder / "model" / "transformer").glob("*.safetensors"):
            with path.open("rb") as file:
                os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    shutil.rmtree(folder / "run", ignore_errors=True)
    caches = {
        "TORCHINDUCTOR_CACHE_DIR": str(folder / "caches" / "inductor"),
        "TRITON_CACHE_DIR": str(folder / "caches" / "triton"),
    }
    launcher = {
        "deepspeed": ["deepspeed", "--num_gpus", str(options.gpus), "--master_port", str(29700 + number)],
        "torchrun": ["torchrun", "--nproc_per_node", str(options.gpus), "--master_port", str(29700 + number)],
        "python": [sys.executable],
    }[options.launcher]
    command = [*launcher, str(ROOT / "train" / "train_lora.py"), "--deepspeed", str(CONFIGS / f"{config}.json")]
    command += ["--model", str(folder / "model"), "--data", str(folder / "data"), "--output_path", str(folder / "run")]
    command += [
        "--max_steps",
        str(options.steps),
        "--log_steps",
        "5",
        "--wandb_mode",
        "disabled",
        *options.flags.split(),
    ]
    if options.py_spy:
        spy = ["py-spy", "record", "-r", "20", "-f", "speedscope", "--subprocesses", "-o"]
        command = [*spy, str(folder / f"start{number}.speedscope"), "--", *command]
    start = time.perf_counter()
    with (folder / f"start{number}.log").open("w") as log:
        code = subprocess.run(command, env=os.environ | caches, stdout=log, stderr=subprocess.STDOUT).returncode
    whole = time.perf_counter() - start
    rows = metrics(folder / "run" / "metrics.jsonl")
    first = next((row for row in rows if "start" in row), {})
    started = first.get("start")
    if code or started is None:
        text = (folder / f"start{number}.log").read_text(errors="replace").splitlines()
        return {"failed": f"exit code {code}: {' | '.join(text[-5:])[:600]}", "seconds": round(whole, 1)}
    steps = [row["seconds_per_step"] for row in rows if "seconds_per_step" in row]
    return {
        "start": started,
        "first_step": round(sum(started.values()), 1),
        "whole": round(whole, 1),
        "step": steps[-1],
        "compiler": first["compiler"],
        "said": said(folder / f"start{number}.log"),
    }


def said(log: Path) -> list[str]:
    """What the run told of its plan, its graphs and its memory."""
    told = ("base_precision", "recomputing", "CUDA graphs", "peak memory", "warning: ", "memory of this host")
    return [line.strip() for line in log.read_text(errors="replace").splitlines() if line.strip().startswith(told)]


def metrics(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def table(rows: list[dict[str, Any]]) -> str:
    """A line a piece, a column a run."""
    good = [row for row in rows if "start" in row]
    names = list(dict.fromkeys(name for row in good for name in row["start"]))
    lines = [f"{'':14}" + "".join(f"{row['config'] + ' ' + row['kind']:>16}" for row in good)]
    lines += [f"{name:14}" + "".join(f"{row['start'].get(name, 0):16.1f}" for row in good) for name in names]
    lines += [f"{'first step at':14}" + "".join(f"{row['first_step']:16.1f}" for row in good)]
    lines += [f"{'s a step':14}" + "".join(f"{row['step']:16.4f}" for row in good)]
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
