"""How many shapes a run's batches have, the text padding that follows, and whether CUDA graphs pay."""

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from train.fit.cuda_graphs_choice import StepTimes
from train.loader.batch_shapes import KEPT, BatchOptions, BatchShapes, batch_shapes, choose_text_padding
from train.step.cuda_graphs import StepGraphs

BUCKETS = [SimpleNamespace(id=id, width=64, height=64 + 16 * id, sources=()) for id in range(10)]


def data_set(bucket: list[int], tokens: list[int], encoded: bool = True, training: Any = None) -> Any:
    characters = np.array(tokens) * 4
    index = SimpleNamespace(
        bucket=np.array(bucket),
        prompt_tokens=np.array(tokens),
        caption_length=characters,
        picture_tokens=np.zeros(len(bucket), np.int32),
        longest_caption=np.zeros(len(bucket), np.int32),
        variant_tokens=np.zeros((len(bucket), 0), np.int32),
    )
    chosen = np.arange(len(bucket)) if training is None else np.array(training, dtype=np.int64)
    empty = torch.zeros(5, 8) if encoded else None
    return SimpleNamespace(
        manifest=SimpleNamespace(buckets=BUCKETS), index=index, encoded=encoded, training=chosen, empty_prompt=empty
    )


STREAM = SimpleNamespace(manifest=SimpleNamespace(buckets=BUCKETS), index=None, encoded=True)


@pytest.mark.parametrize(
    "options,data,multiple,expected",
    [
        ({}, data_set([0, 0, 1, 1], [32, 64, 32, 32]), 32, BatchShapes(3, False)),
        ({}, data_set([0, 0, 1, 1], [32, 63, 32, 32]), 32, BatchShapes(3, True)),
        ({}, data_set([0, 0, 1, 1], [1, 31, 32, 33]), 32, BatchShapes(3, True)),
        ({}, data_set([0, 0, 1], [7, 7, 9]), 1, BatchShapes(2, False)),
        ({"batch_size": 2}, data_set([0, 0, 1], [7, 7, 9]), 1, BatchShapes(2, False)),
        ({"batch_size": 2}, data_set([0, 0, 1], [7, 8, 9]), 1, BatchShapes(3, True)),  # a batch may hold 7 and 8
        ({}, data_set([0, 0, 1], [32, 40, 32], training=[0, 2]), 32, BatchShapes(2, False)),  # 40 is held out
        ({"max_prompt_tokens": 64}, data_set([0, 0], [300, 400]), 32, BatchShapes(1, False)),  # both cut to 64
        ({"caption_dropout": 0.1}, data_set([0, 1], [64, 64]), 32, BatchShapes(4, True)),  # the empty prompt has 5
        ({}, data_set([0, 0, 1], [10, 50, 10], encoded=False), 32, BatchShapes(3, True)),
        ({}, STREAM, 32, BatchShapes(160, True)),
    ],
)
def test_shapes_are_counted(options: dict[str, Any], data: Any, multiple: int, expected: BatchShapes) -> None:
    assert batch_shapes(BatchOptions(**options), data, multiple) == expected


def test_text_is_padded_as_little_as_leaves_few_shapes() -> None:
    gpu, tokens = torch.device("cuda"), list(range(1, 513))
    for buckets, expected in ((1, 32), (6, 32), (7, 64), (10, 64)):
        data = data_set([b for b in range(buckets) for _ in tokens], tokens * buckets)
        assert choose_text_padding(BatchOptions(), data, gpu) == expected, (
            f"{buckets} buckets × 16 lengths, {KEPT} may be kept"
        )
        assert choose_text_padding(BatchOptions(), data, torch.device("cpu")) == 1
    many = [number // 512 for number in range(30 * 512)]
    assert (
        choose_text_padding(BatchOptions(), data_set(many, tokens * 30), gpu) == 32
    )  # 120 even at 128: no graphs, no padding


@pytest.mark.parametrize(
    "launched,replayed,shapes,batches,pays",
    [(0.5, 0.4, 10, 101, True), (0.5, 0.4, 10, 99, False), (0.5, 0.51, 1, 10**6, False), (0.32, 0.31, 80, 10**4, True)],
)
def test_graphs_pay_when_the_run_wins_their_capture_back(
    launched: float, replayed: float, shapes: int, batches: int, pays: bool
) -> None:
    assert StepTimes(launched, replayed, capture=1.0).pay(shapes, batches) is pays


class Small(StepGraphs):
    """Capturing needs as much memory as `room` has places; a pair is just its inputs."""

    room = 4
    error: RuntimeError = torch.OutOfMemoryError("no place")

    def capture(self, inputs: Any) -> Any:
        if len(self.pairs) >= self.room:
            raise self.error
        return SimpleNamespace(inputs=inputs)


def test_other_shapes_make_room_when_memory_runs_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "graph_pool_handle", object)
    monkeypatch.setattr(torch.cuda, "Stream", object)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: None)
    monkeypatch.setattr(
        "train.step.cuda_graphs._Replay", SimpleNamespace(apply=lambda graphs, pair, *_: pair.inputs[0].clone())
    )
    graphs = Small(torch.nn.Linear(1, 1), None, lambda inputs: inputs[0], None, None)  # type: ignore[arg-type, return-value]

    def losses(size: int) -> torch.Tensor:
        return graphs((torch.full((size,), float(size)), None))

    for size in (1, 2, 3, 4):
        assert torch.equal(losses(size), torch.full((size,), float(size)))
    assert len(graphs.pairs) == 4
    before = graphs.pool
    losses(5)  # no room: the four go, and no more than two stay from now on
    assert len(graphs.pairs) == 1 and graphs.kept == 2 and graphs.pool is not before
    for size in (6, 5, 7, 5):
        losses(size)
    assert [key[0][0] for key in graphs.pairs] == [(7,), (5,)]  # the one not met for longest went
    graphs.room, graphs.error = 2, RuntimeError("CUDA error: out of memory")  # as instantiating a graph fails
    losses(8)
    assert [key[0][0] for key in graphs.pairs] == [(8,)] and graphs.kept == 1
    graphs.error = RuntimeError("operation not permitted when stream is capturing")
    graphs.room = 1
    with pytest.raises(RuntimeError, match="capturing"):
        losses(9)
    graphs.pairs.clear()
    graphs.room, graphs.error = 0, torch.OutOfMemoryError("no place")
    with pytest.raises(torch.OutOfMemoryError):
        losses(1)
