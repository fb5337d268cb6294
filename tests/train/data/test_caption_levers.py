"""The caption levers on image shards: who draws what, and that it belongs to (seed, epoch, sample) alone."""

import hashlib
import itertools
from functools import partial
from pathlib import Path

import pytest
import torch

from data_prep.encoding.caption_variants import PLAIN, CaptionOptions, caption_chance
from tests.helpers.data_sets import break_sample, write_set
from train.data.batch import Batch, make_batch
from train.data.draws import sample_draws
from train.data.shard_dataset import ShardDataset
from train.flow.timestep_sampling import SigmaSampling
from train.loader.indexed_loader import BatchLoader
from train.loader.webdataset_stream import StreamedSet, StreamLoader
from train.loader.worker_loader import Reading

LEVERS = CaptionOptions(
    trigger_word="zwx",
    caption_shuffle_tags=True,
    caption_keep_tags=1,
    caption_tag_dropout=0.2,
    caption_alternatives=True,
)


def tags(number: int) -> str:
    return f"cat {number}, red, {{large|small}}, on a sofa, indoors"


@pytest.fixture(scope="module")
def images(tmp_path_factory) -> Path:
    return write_set(tmp_path_factory.mktemp("levers") / "images", payload="png", caption=tags)


def taken(folder: Path, count: int, captions: CaptionOptions = LEVERS, **options) -> list[Batch]:
    dataset = ShardDataset(folder, captions=captions)
    with BatchLoader(dataset, dataset.order(2, seed=3), SigmaSampling(), Reading(**options)) as loader:
        return list(itertools.islice(loader, count))


def by_place(batches: list[Batch]) -> dict[tuple[int, int], str]:
    """(epoch, virtual index) -> caption."""
    return {(b.epoch, i): text for b in batches for i, text in zip(b.indices, b.captions, strict=True)}


@pytest.mark.parametrize("payload", ["png", "safetensors"])
def test_with_all_levers_off_a_run_reads_what_it_read_before_there_were_any(tmp_path, payload):
    found = hashlib.sha256()
    for batch in taken(write_set(tmp_path / "set", payload=payload), 8, PLAIN, caption_dropout=0.3):
        found.update(repr((batch.captions, batch.keys, batch.indices, batch.drop.tolist())).encode())
    assert found.hexdigest()[:16] == "3c7598af3899d3f9"  # as of the version before


def test_captions_are_drawn_anew_each_epoch_and_everything_else_stays(images):
    plain, varied = taken(images, 18, PLAIN, caption_dropout=0.3), taken(images, 18, caption_dropout=0.3)
    for one, other in zip(plain, varied, strict=True):
        assert one.indices == other.indices and torch.equal(one.sigma, other.sigma)
        assert torch.equal(one.noise, other.noise) and torch.equal(one.drop, other.drop)
        assert all(not text for text, dropped in zip(other.captions, other.drop, strict=True) if dropped)
    texts = by_place(varied)
    for (epoch, index), text in texts.items():
        expected = LEVERS.drawn([tags(index)], caption_chance(3, epoch, index))
        assert text in (expected, "") and text.startswith(("zwx, cat ", "")), text
    of_one_sample = {text for (_, index), text in texts.items() if index == 4 and text}
    assert len(of_one_sample) > 1


@pytest.mark.parametrize(
    "options",
    [{"world": 2, "rank": 1}, {"world": 3, "rank": 2, "accumulation": 2}, {"num_workers": 2}, {"consumed": 7}],
)
def test_a_caption_depends_neither_on_ranks_nor_workers_nor_interruptions(images, options):
    everything = by_place(taken(images, 48))
    part = by_place(taken(images, 8, **options))
    assert part and part.items() <= everything.items()


def test_what_replaces_a_broken_sample_has_its_own_caption_by_the_chance_of_the_place(images, tmp_path):
    folder = write_set(tmp_path / "broken", payload="png", caption=tags)
    break_sample(folder, 4)
    dataset = ShardDataset(folder, captions=LEVERS)
    draw = partial(lambda epoch, index, shape: sample_draws(0, epoch, index, shape, SigmaSampling(), 0.0))
    batch = make_batch(dataset, 0, 5, [4, 8], draw, caption_chance=partial(caption_chance, 0))
    assert len(batch.broken) == 1
    assert batch.captions == [
        LEVERS.drawn([tags(6)], caption_chance(0, 5, 4)),
        LEVERS.drawn([tags(8)], caption_chance(0, 5, 8)),
    ]


def test_without_chance_a_sample_has_its_first_form(images):
    dataset = ShardDataset(images, captions=LEVERS)
    assert {dataset.read(3).caption for _ in range(5)} == {"zwx, cat 3, red, large, on a sofa, indoors"}


def test_a_stream_has_the_levers_too(images, capsys):
    dataset = StreamedSet(str(images), print, Path("unused"), LEVERS)

    def captions(options: CaptionOptions) -> list[str]:
        with StreamLoader(dataset.urls, 2, SigmaSampling(), seed=1, captions=options, buffer=4) as loader:
            return [text for batch in itertools.islice(loader, 12) for text in batch.captions]

    found = captions(LEVERS)
    assert found == captions(LEVERS) and all(text.startswith("zwx, cat ") for text in found)
    assert len(set(found)) > 12 and all(text.startswith("cat ") and "{large|small}" in text for text in captions(PLAIN))
