"""Large images: what decoding takes is foreseen from the header, bounded, and had by one process at a time."""

from __future__ import annotations

import io
import itertools
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image

from data_prep.images.header import ImageOptions, read_header
from data_prep.packing import workers
from tests.helpers.photos import encoded, photo

ROOT = Path(__file__).parents[3]
MEASURE = """
import re, sys
from data_prep.images import convert
from data_prep.images.buckets import BucketOptions
from data_prep.images.header import ImageOptions
data = open(sys.argv[1], "rb").read()
options = ImageOptions(BucketOptions((65536,)), resize="pillow")
convert.store(open(sys.argv[2], "rb").read(), options)
def kilobytes(name):
    return int(re.search(name + r":\\s+(\\d+) kB", open("/proc/self/status").read())[1])
before = kilobytes("VmRSS")
convert.store(data, options)
print((kilobytes("VmHWM") - before) * 1024)
"""


def large(mode: str, kind: str, side: int = 4000) -> bytes:
    out = io.BytesIO()
    Image.new(mode, (side, side), {"RGBA": (10, 20, 30, 40), "RGB": (10, 20, 30), "LA": (9, 99)}.get(mode, 7)).save(
        out, kind
    )
    return out.getvalue()


@pytest.mark.parametrize(
    ("mode", "kind"), [("RGBA", "PNG"), ("RGB", "PNG"), ("LA", "PNG"), ("RGB", "JPEG"), ("RGBA", "TIFF")]
)
def test_memory_is_what_the_header_foresees(tmp_path: Path, mode: str, kind: str) -> None:
    (tmp_path / "large").write_bytes(large(mode, kind))
    (tmp_path / "small").write_bytes(encoded(photo(300, 300)))
    command = [sys.executable, "-c", MEASURE, str(tmp_path / "large"), str(tmp_path / "small")]
    found = int(subprocess.run(command, cwd=ROOT, check=True, capture_output=True, text=True).stdout)
    foreseen = read_header(io.BytesIO((tmp_path / "large").read_bytes()), ImageOptions()).memory
    assert 0.3 * foreseen < found < 1.15 * foreseen + 20e6, f"{found / 1e6:.0f} MB, {foreseen / 1e6:.0f} foreseen"


def test_one_large_image_at_a_time(tmp_path: Path) -> None:
    turns = tmp_path / "turns"
    turns.write_bytes(b"")
    script = (
        "import sys, time; from data_prep.packing import workers; workers._turn_file = open(sys.argv[1], 'rb')\n"
        "with workers._turn(int(sys.argv[2])): print(time.time()); time.sleep(0.6); print(time.time())"
    )
    command = [sys.executable, "-c", script, str(turns)]
    spans = {}
    for memory in (workers.LARGE_BYTES + 1, 1000):
        runs = [
            subprocess.Popen([*command, str(memory)], cwd=ROOT, stdout=subprocess.PIPE, text=True) for _ in range(3)
        ]
        spans[memory] = sorted([float(line) for line in run.communicate()[0].split()] for run in runs)
    exclusive = spans[workers.LARGE_BYTES + 1]
    assert all(first[1] <= second[0] for first, second in itertools.pairwise(exclusive))


def test_the_run_says_what_large_images_take(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from data_prep import make_shards

    base = tmp_path / "in"
    base.mkdir()
    (base / "a.png").write_bytes(large("1", "PNG", 8000))
    (base / "a.txt").write_text("large")
    flags = ["--dataset_base_path", str(base), "--output_path", str(tmp_path / "out"), "--num_workers", "0"]
    assert make_shards.main([*flags, "--resize", "pillow", "--plan_only"]) == 0
    assert (
        "the largest image takes about 0.5 GB while it is decoded; images above 0.32 GB are decoded one at a time"
        in capsys.readouterr().out
    )
