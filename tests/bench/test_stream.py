"""The benchmarks of the stream, tiny on the CPU: every home computes the same, and waiting is told from working."""

import json
import os
from pathlib import Path

import pytest

from bench import stream, stream_equality
from bench.waiting import kernels_of, waiting
from tests.helpers.forked_ranks import import_once, run_ranks  # noqa: F401 (a fixture)

TINY = ["--layers", "2", "--heads", "1", "--size", "32", "--recompute", "2"]


@pytest.fixture(autouse=True)
def restored_environment():
    before = dict(os.environ)
    yield
    os.environ.clear()
    os.environ.update(before)


def test_other_libraries_and_every_home_give_the_same_losses(tmp_path: Path):
    out = tmp_path / "rows.json"
    homes = "device,host-1,fully_shard,fully_shard_host,deepspeed_leaf,deepspeed_leaf_host"
    arguments = [*TINY, "--homes", homes, "--repeats", "1", "--profile", "--out", str(out)]
    assert (
        run_ranks(1, stream.main, arguments) == 0
    )  # in a process of its own: DeepSpeed's groups outlive the benchmark
    rows = json.loads(out.read_text())["rows"]
    assert [row["home"] for row in rows] == homes.split(",")
    assert all(row["losses"] == pytest.approx(rows[0]["losses"], rel=1e-6) and row["seconds"] > 0 for row in rows)
    assert rows[0]["losses"][-1] < rows[0]["losses"][0]


def equality(world: int, folder: Path, homes: str, *more: str) -> list[dict]:
    out = folder / f"{world}.json"
    arguments = [*TINY, "--homes", homes, "--steps", "2", "--batch", "6", "--out", str(out), "--tolerance", "0", *more]
    assert run_ranks(world, stream_equality.main, arguments) == 0
    return json.loads(out.read_text())["rows"]


def test_homes_are_bit_equal_and_numbers_of_ranks_equal_to_rounding(tmp_path: Path):
    one = equality(1, tmp_path, "host,host-float8,host-int8")
    assert [row["against"] for row in one] == ["device", "device-float8", "device-int8"]
    for world in (2, 3):
        rows = equality(world, tmp_path, "ranks,ranks_host-float8,host-1", "--against", str(tmp_path / "1.json"))
        assert all(row["bit_equal"] for row in one + rows)
        assert all(row["from_earlier_run"] < 1e-6 for row in rows)


def test_what_is_wrong_is_refused(capsys: pytest.CaptureFixture[str]):
    assert stream.main([*TINY, "--homes", "hots"]) == 2
    assert "there is no home hots: say device, host," in capsys.readouterr().err


def trace(*kernels: tuple[str, str, int, float, float, float]) -> list[dict]:
    """A Chrome trace of (category, name, stream, start, duration, launched)."""
    events: list[dict] = [{"ph": "M", "name": "process_name"}]
    for number, (category, name, number_of_stream, start, duration, launched) in enumerate(kernels):
        link = {"correlation": number}
        events.append({"ph": "X", "cat": "cuda_runtime", "name": "launch", "ts": launched, "dur": 1, "args": link})
        where = link | {"stream": number_of_stream}
        events.append({"ph": "X", "cat": category, "name": name, "ts": start, "dur": duration, "args": where})
    return events


def test_waiting_for_weights_is_told_from_waiting_for_the_host():
    result = waiting(
        kernels_of(
            trace(
                ("kernel", "gemm", 7, 0, 100, 0),
                ("gpu_memcpy", "Memcpy HtoD (Pinned -> Device)", 13, 50, 150, 0),
                ("kernel", "gemm", 7, 200, 100, 10),  # launched early: the fetch kept it for 100
                ("kernel", "ncclDevKernel_AllGather_RING", 20, 310, 50, 10),
                ("kernel", "gemm", 7, 400, 100, 390),  # launched late: not the fetch's fault, though one ran
                ("kernel", "ncclDevKernel_AllReduce_Sum", 21, 510, 90, 10),  # of gradients
                ("kernel", "decode", 13, 600, 40, 20),  # what follows a fetch on its stream
                ("kernel", "gemm", 7, 640, 60, 20),
                ("kernel", "gemm", 7, 701, 99, 20),  # a microsecond is no gap
            )
        )
    )
    assert result is not None
    in_us = {name: round(value * 1e6) if name != "waiting_share" else value for name, value in result.items()}
    assert in_us == {
        "wall": 800,
        "fetching": 150 + 50 + 40,
        "waits_for_weights": 100 + 40,
        "waits_for_host": 100 + 10,
        "waiting_share": 140 / 800,
    }
    assert waiting([]) is None
