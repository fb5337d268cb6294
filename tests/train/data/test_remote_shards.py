"""Remote data over a real HTTP server: byte ranges, what servers do wrong, answers that are lost or cut short."""

import itertools
import os
import re
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import SimpleNamespace
from zlib import crc32

import numpy as np
import pytest

from tests.helpers.data_sets import assert_equal, write_set
from tests.helpers.shard_cache import cached, size, wait_for
from train.data.remote_cache import ShardsAhead
from train.data.remote_shards import WAITS, Remote, Unreachable, open_remote
from train.data.sample import BrokenSample
from train.data.shard_dataset import ShardDataset
from train.flow.timestep_sampling import SigmaSampling
from train.loader.indexed_loader import BatchLoader
from train.loader.worker_loader import Reading


@pytest.fixture
def served(tmp_path, monkeypatch):
    """A data set on 127.0.0.1: its url, its folder, and what the server is to do wrong."""
    pytest.importorskip("aiohttp")
    folder = write_set(tmp_path / "served" / "set", samples=30, shard_size=5)
    wrong = SimpleNamespace(ranges=True, fail=lambda asked: None, requests=0)

    class Handler(BaseHTTPRequestHandler):
        def do_HEAD(self) -> None:
            self.answer(body=False)

        def do_GET(self) -> None:
            self.answer(body=True)

        def answer(self, body: bool) -> None:
            wrong.requests += 1
            failure = wrong.fail(f"{self.path} {self.headers.get('Range')}")
            path = folder.parent / self.path.lstrip("/")
            if failure == 503 or not path.is_file():
                return self.send_error(503 if failure else 404)
            data, status = path.read_bytes(), 200
            total, asked = len(data), re.fullmatch(r"bytes=(\d+)-(\d+)", self.headers.get("Range", ""))
            if asked and wrong.ranges:
                start, end = int(asked[1]), int(asked[2]) + 1
                if start >= total:
                    return self.send_error(416)
                data, status = data[start:end], 206
            self.send_response(status)
            self.send_header("Content-Length", str(len(data)))
            if wrong.ranges:
                self.send_header("Accept-Ranges", "bytes")
            self.end_headers()
            if body:
                self.wfile.write(data[: len(data) // 2] if failure == "cut" else data)
                self.close_connection = failure == "cut"
            return None

        def log_message(self, *_: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    monkeypatch.setattr("train.data.remote_shards.WAITS", (0.01,) * 8)
    yield f"http://127.0.0.1:{server.server_port}/set", folder, wrong
    server.shutdown()
    thread.join()
    server.server_close()


@pytest.mark.parametrize("workers,limit", [(0, 0), (2, 40_000), (2, 10**9)])
def test_batches_over_http_are_those_of_the_disk(served, tmp_path, workers, limit):
    """Of what is asked for the first time a quarter is answered by half a body, a quarter by 503."""
    url, folder, wrong = served
    before: set[str] = set()
    failures: list[str] = []

    def fail(asked: str) -> str | int | None:
        known = asked in before or not asked.partition(" ")[0].endswith(".tar")
        before.add(asked)
        if known or not (answer := ("cut", 503, None, None)[crc32(asked.encode()) % 4]):
            return None
        failures.append(asked)
        return answer

    wrong.fail = fail
    dataset, local = ShardDataset(url, cache_folder=tmp_path / "cache"), ShardDataset(folder)
    reading = Reading(num_workers=workers, say=lambda line: pytest.fail(line))
    order = dataset.order(2, seed=1, window=2)
    with (
        BatchLoader(dataset, order, SigmaSampling(), reading, limit) as far,
        BatchLoader(local, local.order(2, seed=1, window=2), SigmaSampling()) as near,
    ):
        for a, b in itertools.islice(zip(far, near, strict=True), 2 * order.length):
            assert_equal(a, b)
            assert sum(map(size, dataset.folder.glob("*.tar"))) <= limit
        if limit > 10**6:
            wait_for(lambda: len(cached(dataset)) == 6)
    assert failures and not list(dataset.folder.glob(".partial-*"))


def test_a_server_without_byte_ranges_is_refused_at_start(served, tmp_path):
    url, _, wrong = served
    wrong.ranges = False
    with pytest.raises(ValueError, match=r"asked for 1 bytes, got \d+: the server knows no byte ranges; .*webdataset"):
        open_remote(url, tmp_path / "cache")


def test_what_the_server_lacks_is_named(served, tmp_path):
    url, folder, _ = served
    with pytest.raises(FileNotFoundError, match=r"/nothing holds no manifest\.json"):
        open_remote(f"{url}/nothing", tmp_path / "cache")
    (folder / "000000.tar").rename(folder / "away")
    with pytest.raises(FileNotFoundError, match=r"holds no 000000\.tar, though its manifest\.json lists it"):
        open_remote(url, tmp_path / "cache")
    (folder / "away").rename(folder / "000000.tar")
    (folder / "index.parquet").unlink()
    with pytest.raises(FileNotFoundError, match=r"holds no index\.parquet"):
        open_remote(url, tmp_path / "another")


def test_shards_shorter_and_longer_than_the_manifest_says(served, tmp_path):
    url, folder, wrong = served
    os.truncate(folder / "000001.tar", 5000)
    with (folder / "000002.tar").open("ab") as file:
        file.write(b"more")
    dataset, said = ShardDataset(url, cache_folder=tmp_path / "cache"), list[str]()
    before = wrong.requests
    with pytest.raises(BrokenSample, match=r"000001\.tar ends before byte"):
        dataset.read(9)
    assert wrong.requests - before == 2, "not asked for again and again: one look at the size tells"
    with ShardsAhead(dataset.reader, dataset.order(1), dataset.index.shard, 0, 10**9, said.append):
        wait_for(lambda: len(cached(dataset)) == 5 and said)
    assert (
        len(said) == 1 and "000001.tar, fetched 2 times, is not what the manifest says: it ends before byte" in said[0]
    )
    assert dataset.read(12).caption == "caption 12 é"
    assert (dataset.folder / "000002.tar").stat().st_size == dataset.manifest.shards[2].bytes


@pytest.mark.parametrize("workers", [0, 1])
def test_a_remote_that_stops_answering_ends_the_run(served, tmp_path, workers):
    """Its samples are not broken: going on with others would make the training depend on the network."""
    url, _, wrong = served
    dataset = ShardDataset(url, cache_folder=tmp_path / "cache")
    with BatchLoader(dataset, dataset.order(2), SigmaSampling(), Reading(num_workers=workers)) as loader:
        next(iter(loader))
        wrong.fail = lambda asked: 503
        with pytest.raises(Unreachable, match=r"\.tar: .*503"):
            list(itertools.islice(loader, 40))
        assert loader.broken == 0


class ServerDisconnected(Exception):
    """As aiohttp's and botocore's: no OSError."""


class Flaky:
    """A filesystem whose first answers are lost."""

    def __init__(self, losses: int) -> None:
        self.losses = losses

    def cat_file(self, path: str, start: int | None = None, end: int | None = None) -> bytes:
        self.losses -= 1
        if self.losses >= 0:
            raise ServerDisconnected("lost")
        return bytes(np.arange(100, dtype=np.uint8))[start:end]


def test_a_lost_answer_is_asked_for_again(monkeypatch):
    remote = Remote("s3://bucket/set")
    waits: list[float] = []
    monkeypatch.setattr("train.data.remote_shards.time.sleep", waits.append)
    flaky = Flaky(3)
    monkeypatch.setattr("fsspec.filesystem", lambda *_, **__: flaky)
    assert remote.read("000000.tar", 10, 15) == bytes(range(10, 15)) and len(waits) == 3 and waits == sorted(waits)
    flaky.losses = 100
    with pytest.raises(Unreachable, match=r"s3://bucket/set/000000\.tar: ServerDisconnected: lost"):
        remote.read("000000.tar", 10, 15)
    assert 60 < sum(waits) < 600 and flaky.losses == 100 - len(WAITS) - 1
