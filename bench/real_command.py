"""What `deepspeed train/train_lora.py` gives on one GPU: full-size random model, encoded shards, ZeRO-2, W&B offline.

    python bench/real_command.py --part single,mixed                      # 4 to 7 minutes, as the host's CPU is
    python bench/real_command.py --part sizes --precisions bfloat16 --seconds 600   # 6 minutes for six sizes, 9 with float8
    python bench/real_command.py --part single,mixed,sizes --tiny         # 2 narrow blocks, 64 pixels: to try the script

single: one bucket, prompts of 128 tokens: a step against the bare one of bench/train_step.py, and how long the GPU is idle
mixed: 10 buckets of one area, prompts of 5 to 500 tokens: images a second against single, compilations, CUDA graphs, memory
sizes: time, memory and recomputed blocks under --activation_checkpointing auto, with a bf16 and a float8 base

A step's time lies between the GPU's own time stamps after two steps, so nothing waits for it; the profiler watches steps
that do not count. Weights are drawn on the GPU instead of read from a disk. Compiler caches start empty. The table is printed
after each part, and a line after each run: a script that is stopped has told what it knew.
"""

import argparse
import importlib.util
import json
import os
import random
import shutil
import statistics
import sys
import tempfile
import time
from fractions import Fraction
from pathlib import Path
from typing import Any
from unittest.mock import patch

from bench.measured_training import measure_runs, run, settled, step_seconds
from bench.out_file import out_file, write_numbers

ROOT = Path(__file__).resolve().parent.parent
PARTS = ("single", "mixed", "sizes")
SIZES = "1024x1,512x4,1328x1,1024x2,512x8,512x1"
WARM_UP, TIMED, PROFILED = 10, 30, 6  # steps
NOT_MEASURED = "not measured: it failed, no step settled, or time was up"
BUCKETS, SHORTEST, LONGEST, TEXT = 10, 5, 500, 128

Rows = list[tuple[str, str, str]]  # what, measured, wanted
Result = dict[str, Any]


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--part", default="single,mixed", help="comma list of single, mixed, sizes (default all but sizes)"
    )
    parser.add_argument("--layers", type=int, default=60, help="blocks of the transformer (default 60)")
    parser.add_argument("--tiny", action="store_true", help="2 narrow blocks, sides a 16th, few steps: on the CPU too")
    parser.add_argument("--launcher", choices=("deepspeed", "python"), default="deepspeed", help="of single and mixed")
    parser.add_argument("--config", type=Path, default=ROOT / "ds_configs" / "zero2.json")
    parser.add_argument("--per_bucket", type=int, default=3, help="samples of each bucket in mixed (default 3)")
    parser.add_argument("--sizes", default=SIZES, help=f"comma list of SIDExBATCH for the part sizes (default {SIZES})")
    parser.add_argument(
        "--precisions", default="bfloat16,float8", help="of the base, in sizes (default bfloat16,float8)"
    )
    parser.add_argument("--seconds", type=float, default=270.0, help="sizes begins no run after so long (default 270)")
    parser.add_argument(
        "--folder", type=Path, help="for data and run folders, 3 GB; removed (default: a temporary one)"
    )
    parser.add_argument("--out", type=out_file, help="JSON file for all numbers")
    options = parser.parse_args(argv)
    parts = options.part.split(",")
    if not set(parts) <= set(PARTS):
        parser.error(f"--part {options.part}: choose from {', '.join(PARTS)}")

    folder = Path(tempfile.mkdtemp(prefix="real_command_", dir=options.folder))
    caches = {"TORCHINDUCTOR_CACHE_DIR": str(folder / "inductor"), "TRITON_CACHE_DIR": str(folder / "triton")}
    try:
        with patch.dict(os.environ, {name: path for name, path in caches.items() if name not in os.environ}):
            bench = RealCommand(options, folder)
            for part in parts:
                start = time.perf_counter()
                try:
                    getattr(bench, part)()
                except RuntimeError as error:  # what was measured before is still told
                    bench.rows.append((part, f"failed: {error}", ""))
                bench.rows.append((f"{part} took", f"{time.perf_counter() - start:.0f} s", ""))
                bench.tell()  # all so far: who stops the script here has that
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    return int(any(measured.startswith(("failed", NOT_MEASURED)) for _, measured, _ in bench.rows))


class RealCommand:
    """The parts by name, which fill `rows` for the table and `results` with all that was measured."""

    def __init__(self, options: argparse.Namespace, folder: Path) -> None:
        from demo.random_model import write_random_model

        self.options, self.folder = options, folder
        self.rows: Rows = []
        self.results: dict[str, Result | None] = {}
        self.text_dim = 64 if options.tiny else 3584
        size = {"layers": 2, "heads": 2} if options.tiny else {"layers": options.layers}
        write_random_model(folder / "model", **size, text_dim=self.text_dim, hollow=True)
        self.scale = 16 if options.tiny else 1
        self.text = TEXT // self.scale
        self.warm_up, self.timed = (2, 3) if options.tiny else (WARM_UP, TIMED)

    def flags(self, name: str, data: Path, steps: int, *more: str) -> list[str]:
        """train_lora.py's flags: its defaults but for the end of the run, and W&B."""
        wandb = "disabled" if importlib.util.find_spec("wandb") is None else "offline"
        flags = ["--deepspeed", str(self.options.config), "--model", str(self.folder / "model"), "--data", str(data)]
        flags += ["--output_path", str(self.folder / name), "--max_steps", str(steps), "--save_steps", "0"]
        # A real run is long enough to choose them by itself; of so few steps it would not.
        return [*flags, "--wandb_mode", wandb, "--cuda_graphs", "on", *more]

    def train(self, name: str, data: Path, steps: int) -> Result:
        """Measure one run of so many steps, and a few more that are profiled. Raises RuntimeError when it fails."""
        flags = self.flags(name, data, steps + PROFILED)
        (result,) = measure_runs([flags], profiled=PROFILED, hollow=True, launcher=self.options.launcher)
        shutil.rmtree(self.folder / name, ignore_errors=True)
        if result is None:
            raise RuntimeError(f"the run {name} failed")
        self.results[name] = result
        return result

    def tell(self) -> None:
        """Print the table of all that was measured so far, and write it to --out."""
        print("\n| what | measured | wanted |\n| --- | --- | --- |")
        print("".join(f"| {' | '.join(row)} |\n" for row in self.rows), flush=True)
        if self.options.out:
            write_numbers(self.options.out, self.results)

    def single(self) -> None:
        from demo.random_model import write_random_encoded

        side = 1024 // self.scale
        data = write_random_encoded(self.folder / "one_bucket", 8, side, side, [self.text] * 8, self.text_dim)
        result = self.train("single", data, self.warm_up + self.timed)
        times = sorted(step["seconds"] for step in settled(result, self.warm_up))
        middle = statistics.median(times)
        wandb = "without W&B" if importlib.util.find_spec("wandb") is None else "W&B offline"
        say = self.rows.append
        say((f"single: {side}², {self.text} text tokens, {self.options.launcher}, {wandb}", "", ""))
        say(("s a step", f"{middle:.4f} ({times[0]:.4f} to {times[-1]:.4f})", ""))
        if self.options.tiny:
            say(("the bare step", "not measured on narrow blocks", ""))
        else:
            bare = self.bare_step()
            self.results["bare"] = bare
            ratio = f"{middle / bare['seconds']:.3f} × the bare step of {bare['seconds']:.4f} s"
            say(("against the bare step", ratio, "≤ 1.03"))
        self.rows += [*idle_rows(result), *start_rows(result), *memory_rows(result)]

    def bare_step(self) -> Result:
        """bench/train_step.py's `ours`, in a process of its own."""
        out = self.folder / "bare.json"
        command = [sys.executable, str(ROOT / "bench" / "train_step.py"), "--layers", str(self.options.layers)]
        run([*command, "--variants", "ours", "--text", str(TEXT), "--repeats", str(TIMED), "--out", str(out)])
        return json.loads(out.read_text())["rows"][0]

    def mixed(self) -> None:
        from demo.random_model import write_random_encoded

        sizes = mixed_sizes(1024 // self.scale)
        samples = self.options.per_bucket * len(sizes)
        draw = random.Random(0)
        lengths = [draw.randint(SHORTEST, LONGEST // self.scale) for _ in range(samples)]
        data = write_random_encoded(self.folder / "mixed_data", samples, 0, 0, lengths, self.text_dim, sizes)
        epochs = 1 if self.options.tiny else max(1, 60 // samples)
        result = self.train("mixed", data, samples * (1 + epochs))
        after = [step for step in result["steps"][samples:] if not step["profiled"]]  # every batch was met once before
        rate = len(after) / sum(step["seconds"] for step in after)
        say = self.rows.append
        say((f"mixed: {len(sizes)} buckets, {samples} prompts of {min(lengths)} to {max(lengths)} tokens", "", ""))
        say(("images a second from the second epoch on", f"{rate:.3f}", ""))
        if "single" in self.results:
            one = settled(self.results["single"], self.warm_up)
            against = rate * statistics.mean(step["seconds"] for step in one)
            say(("against single", f"{against:.3f} ×", "≥ 0.9"))
        tokens = statistics.mean(step["tokens"] for step in after)
        late = sum(step["captures"] for step in after), sum(step["compile_seconds"] > 0 for step in after)
        say(
            (
                "of these steps",
                f"{len(after)}, {tokens:.0f} tokens on average; {late[0]} captured, {late[1]} compiled",
                "",
            )
        )
        self.rows += [*idle_rows(result), *start_rows(result), *memory_rows(result)]

    def sizes(self) -> None:
        from demo.random_model import write_random_encoded

        until = time.time() + self.options.seconds
        sizes = [(int(side) // self.scale // 16 * 16, int(batch)) for side, batch in split(self.options.sizes)]
        for side in {side for side, _ in sizes}:
            write_random_encoded(self.folder / f"{side}", 8, side, side, [self.text] * 8, self.text_dim)
        head = "s a step", "images/s", "recomputed", "peak GiB", "predicted"
        self.rows.append(("sizes: base, side × batch", ", ".join(head), ""))
        for precision in self.options.precisions.split(","):
            base = {"bfloat16": "dtype"}.get(precision, precision)
            runs = []
            for side, batch in sizes:
                more = ("--batch_size", str(batch), "--base_precision", base, "--activation_checkpointing", "auto")
                name = f"{precision} {side} × {batch}"
                runs.append(self.flags(name, self.folder / f"{side}", 3 + min(self.timed, 5), *more))
            for (side, batch), result in zip(sizes, measure_runs(runs, hollow=True, until=until), strict=True):
                name = f"{precision} {side}² × {batch}"
                self.results[name] = result
                self.rows.append((name, size_row(result, batch), ""))


def split(sizes: str) -> list[list[str]]:
    return [size.split("x") for size in sizes.split(",")]


def mixed_sizes(side: int) -> list[tuple[int, int]]:
    """Up to BUCKETS of the packer's buckets around side² pixels, (width, height), evenly from narrow to wide."""
    from data_prep.images.buckets import bucket_table

    table = bucket_table(side * side, 32 if side > 512 else 16, Fraction(2))
    count = min(BUCKETS, len(table))
    return [table[round(place * (len(table) - 1) / (count - 1))] for place in range(count)]


def idle_rows(result: Result) -> Rows:
    profile = result.get("profile")
    if not profile:
        return [("GPU idle", "not measured: no kernels were seen", "≤ 1 %")]
    text = f"{profile['long_gaps'] / profile['wall']:.2%} of a profiled step in gaps above 20 µs; "
    text += f"no kernel runs for {1 - profile['busy'] / profile['wall']:.2%} of it"
    note = f"{profile['kernels']:.0f} kernels, {profile['busy']:.4f} s; the profiled step {profile['wall']:.4f} s"
    return [("GPU idle", text, "≤ 1 %"), ("a step's kernels", note, "")]


def start_rows(result: Result) -> Rows:
    """Compilation, CUDA graphs, and the way to the first step."""
    compiled = f"{result['compilations']} graphs in {result['compile_seconds']:.1f} s"
    captured = f"{result['captures']} shapes in {result['capture_seconds']:.1f} s"
    if result["captures"]:
        captured += f", {result['capture_seconds'] / result['captures']:.2f} s each"
    first = f"{result['first_step_after']:.0f} s from the command's imports to the first step, {result['seconds']:.0f} s in all"
    return [("compiled", compiled, ""), ("CUDA graphs captured", captured, ""), ("start", first, "")]


def memory_rows(result: Result) -> Rows:
    """The peak against the trainer's own prediction, and what torch does not count."""
    host = f"host peak {result['host_gib']:.1f} GiB"
    if "gpu_gib" not in result:
        return [("memory", host, "")]
    peak, predicted = result["gpu_gib"], result["predicted_gib"]
    text = f"{peak:.2f} GiB, predicted {predicted:.2f} ({peak / predicted - 1:+.1%}); {recomputed(result)}"
    beside = f"reserved {result['reserved_gib']:.2f}, outside torch's allocator {result['outside_gib']:.2f} GiB; {host}"
    return [("peak memory", text, "± 5 %"), ("besides", beside, "")]


def recomputed(result: Result) -> str:
    return f"{result['recomputed']} of {result['blocks']} blocks recomputed"


def size_row(result: Result | None, batch: int) -> str:
    if result is None or (seconds := step_seconds(result)) is None:
        return NOT_MEASURED
    text = f"{seconds:.4f}, {batch / seconds:.2f}, {result['recomputed']}/{result['blocks']}"
    if "gpu_gib" in result and result["predicted_gib"]:
        text += f", {result['gpu_gib']:.2f}, {result['predicted_gib']:.2f}"
    return text


if __name__ == "__main__":
    sys.exit(main())
