"""Peak memory of make_shards.py for 10,000 and for 100,000 small images: it must stay flat.

python bench/packing_memory.py                       # a few minutes
python bench/packing_memory.py --counts 1000,10000
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

PICTURES = 200  # that differ; the others are hard links to them, each with a caption of its own
MEASURED = """
import resource, sys
from data_prep import make_shards
code = make_shards.main(sys.argv[1:])
peaks = [resource.getrusage(who).ru_maxrss for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
print("PEAK", *peaks)
sys.exit(code)
"""


def make_folder(folder: Path, count: int) -> None:
    import simplejpeg

    rng = np.random.default_rng(3)
    for number in range(count):
        part = folder / f"{number // 1000:03d}"
        if number % 1000 == 0:
            part.mkdir(parents=True)
        path = part / f"{number:06d}.jpg"
        if number < PICTURES:
            pixels = rng.normal(120, 40, (96 + number % 40, 100, 3)).clip(0, 255).astype(np.uint8)
            path.write_bytes(simplejpeg.encode_jpeg(pixels, 90))
        else:
            os.link(folder / "000" / f"{number % PICTURES:06d}.jpg", path)
        path.with_suffix(".txt").write_text(f"small picture number {number}, with a caption of ordinary length " * 2)


def measure(count: int, workers: int) -> tuple[float, float, float]:
    """Peak MB of the main process, of its largest worker, and images/s."""
    with tempfile.TemporaryDirectory() as folder:
        make_folder(Path(folder) / "in", count)
        flags = ["--dataset_base_path", f"{folder}/in", "--output_path", f"{folder}/out", "--max_pixels", "4096"]
        start = time.perf_counter()
        command = [sys.executable, "-c", MEASURED, *flags, "--num_workers", str(workers)]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        seconds = time.perf_counter() - start
        if done.returncode:
            raise RuntimeError(done.stderr)
        peaks = [int(value) / 1024 for value in done.stdout.rpartition("PEAK ")[2].split()]
    return peaks[0], peaks[1], count / seconds


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--counts", default="10000,100000")
    parser.add_argument("--num_workers", type=int, default=1)
    args = parser.parse_args(argv)
    print("| images | main process MB | largest worker MB | images/s |\n| --- | --- | --- | --- |")
    totals = []
    for count in map(int, args.counts.split(",")):
        main_peak, worker_peak, speed = measure(count, args.num_workers)
        totals.append(main_peak + args.num_workers * worker_peak)
        print(f"| {count} | {main_peak:.0f} | {worker_peak:.0f} | {speed:.0f} |", flush=True)
    print(f"last : first = {totals[-1] / totals[0]:.2f}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
