"""Worker processes: in order, bounded, ended with their parent, and not ended by an image."""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

from data_prep.images.header import ImageOptions
from data_prep.images.skip_reasons import BadImage
from data_prep.packing import workers
from data_prep.sources.found_input import Input
from tests.helpers.photos import die_if_deadly, encoded, photo

ROOT = Path(__file__).parents[3]
PICTURE = encoded(photo(300, 200))


def test_workers_end_with_their_parent(tmp_path: Path) -> None:
    base = tmp_path / "in"
    base.mkdir()
    for number in range(200):
        (base / f"{number}.jpg").write_bytes(PICTURE)
        (base / f"{number}.txt").write_text("caption")
    command = [
        "--dataset_base_path",
        base,
        "--output_path",
        tmp_path / "out",
        "--num_workers",
        "2",
        "--resize",
        "pillow",
    ]
    run = subprocess.Popen([sys.executable, "-m", "data_prep.make_shards", *map(str, command)], cwd=ROOT)
    children: list[str] = []
    while run.poll() is None and len(children) < 3:  # two workers, and multiprocessing's own helper
        children = Path(f"/proc/{run.pid}/task/{run.pid}/children").read_text().split()
    run.kill()
    run.wait()
    deadline = time.monotonic() + 20
    while time.monotonic() < deadline and any(Path(f"/proc/{child}").exists() for child in children):
        time.sleep(0.1)
    assert children and not any(Path(f"/proc/{child}").exists() for child in children)


def test_an_image_that_kills_its_process_is_one_failed_row() -> None:
    items = [Input(str(number), b"deadly" if number == 7 else b"", 0, 0, "") for number in range(20)]
    job = workers.Job(b"", ImageOptions())
    with workers.Workers(2) as pool:
        found = list(pool.map(die_if_deadly, job, items, chunk=3))
    assert [str(result) for result in found[:7] + found[8:]] == [str(number) for number in range(20) if number != 7]
    assert isinstance(found[7], BadImage) and found[7].reason == "killed its process"


def test_few_items_are_taken_ahead_of_the_results() -> None:
    taken = 0

    def counted() -> Iterator[Input]:
        nonlocal taken
        for number in range(1000):
            taken += 1
            yield Input(str(number), b"", 0, 0, "")

    with workers.Workers(1) as pool:
        results = pool.map(die_if_deadly, workers.Job(b"", ImageOptions()), counted(), chunk=2)
        assert [next(results) for _ in range(10)] == [str(number) for number in range(10)]
        assert taken <= 10 + 2 * 5


def test_a_file_that_shrank_since_the_plan(tmp_path: Path) -> None:
    (tmp_path / "a.jpg").write_bytes(PICTURE[:100])
    job = workers.Job(bytes(tmp_path), ImageOptions())
    for item, reason in (
        (Input("a.jpg", b"a.jpg", 0, len(PICTURE), ""), "changed since the plan"),
        (Input("x.tar/a.jpg", b"a.jpg", 50, 100, ""), "changed since the plan"),
        (Input("b.jpg", b"b.jpg", 0, 10, ""), "unreadable"),
    ):
        found = workers.store(job, item)
        assert isinstance(found, BadImage) and (found.status, found.reason) == ("failed", reason)
