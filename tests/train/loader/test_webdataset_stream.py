"""The webdataset fallback: the same batches' content, without the promises."""

import itertools
import os

import pytest
import torch

from tests.helpers.data_sets import assert_equal, break_sample, embeds_of, latent_of, write_set
from train.data.batch import Batch
from train.data.sample import BrokenSample
from train.data.shard_dataset import ShardDataset
from train.flow.timestep_sampling import SigmaSampling
from train.loader.webdataset_stream import StreamedSet, StreamLoader
from train.loader.worker_loader import Reading


def urls(folder) -> list[str]:
    return [str(path) for path in sorted(folder.glob("*.tar"))]


@pytest.mark.parametrize("workers", [0, 2])
def test_batches_hold_what_the_shards_hold(tmp_path, workers):
    folder = write_set(tmp_path / "encoded")
    empty = ShardDataset(folder).empty_prompt
    with StreamLoader(
        urls(folder), 2, SigmaSampling(), Reading(num_workers=workers), empty_prompt=empty, buffer=8
    ) as loader:
        batches = list(itertools.islice(loader, 40))
        loader.stepped()
    seen = set()
    for batch in batches:
        assert batch.noise.shape == batch.latents.shape and len(set(map(str, batch.sigma))) >= 1
        for row, key in enumerate(batch.keys):
            number = int(key[:6]) * 5 + int(key[6:])
            seen.add(number)
            assert torch.equal(batch.latents[row, :, 0], latent_of(number))
            assert torch.equal(batch.prompt_embeds[row, : 5 + number % 4], embeds_of(number))
            assert batch.captions[row] == f"caption {number} é"
    assert len(seen) >= 10 and loader.consumed == 1 and loader.state()["order"] == {"loader": "webdataset"}


@pytest.mark.parametrize("workers", [0, 2])
def test_the_same_start_gives_the_same_batches_and_another_start_other_noise(tmp_path, workers):
    folder = write_set(tmp_path / "encoded")
    empty = ShardDataset(folder).empty_prompt

    def taken(consumed: int = 0, rank: int = 0) -> list[Batch]:
        reading = Reading(num_workers=workers, consumed=consumed, rank=rank, world=2)
        with StreamLoader(urls(folder), 2, SigmaSampling(), reading, empty_prompt=empty, buffer=8) as loader:
            return list(itertools.islice(loader, 12))

    first, again, later, other = taken(), taken(), taken(consumed=100), taken(rank=1)
    for a, b in zip(first, again, strict=True):
        assert_equal(a, b)
    assert [batch.place for batch in first] == list(range(0, 24, 2)) and later[3].place == 106 and other[3].place == 7
    noises = [row for batch in (*first, *later, *other) for row in batch.noise]
    for count, noise in enumerate(noises):
        assert not any(noise.shape == n.shape and torch.equal(noise, n) for n in noises[:count])


@pytest.mark.parametrize("damage", ["truncated", "missing"])
def test_a_broken_shard_is_left_out_or_stops(tmp_path, damage):
    folder = write_set(tmp_path / "images", payload="png")
    paths, said = urls(folder), []
    if damage == "truncated":
        os.truncate(paths[1], 700)
    else:
        os.unlink(paths[1])
    with StreamLoader(paths, 2, SigmaSampling(), Reading(say=said.append), buffer=4) as loader:
        keys = {key for batch in itertools.islice(loader, 30) for key in batch.keys}
    assert (
        any(key.startswith("000002") for key in keys) and "left out: a shard: " in said[0] and "000001.tar" in said[0]
    )
    stop = Reading(on_broken_sample="stop", num_workers=1)
    with StreamLoader(paths, 2, SigmaSampling(), stop, buffer=4) as loader, pytest.raises(BrokenSample, match="000001"):
        list(itertools.islice(loader, 200))
    with (
        StreamLoader(paths[1:2], 2, SigmaSampling(), buffer=4) as loader,
        pytest.raises(BrokenSample, match="a shard: "),
    ):
        next(iter(loader))


def test_images_and_dropout(tmp_path):
    folder = write_set(tmp_path / "images", payload="png")
    with StreamLoader(urls(folder), 3, SigmaSampling(), Reading(caption_dropout=1.0), buffer=4) as loader:
        batch = next(iter(loader))
    assert batch.pixels.shape in ((3, 3, 16, 32), (3, 3, 32, 16)) and batch.captions == ["", "", ""]


def test_a_broken_sample_is_left_out_or_stops(tmp_path):
    folder = write_set(tmp_path / "images", payload="png")
    break_sample(folder, 4)
    said: list[str] = []
    with StreamLoader(urls(folder), 2, SigmaSampling(), Reading(say=said.append), buffer=4) as loader:
        keys = {key for batch in itertools.islice(loader, 40) for key in batch.keys}
    assert "000000000004" not in keys and loader.broken > len(said) == 1 and "000000000004 in " in said[0]
    with (
        StreamLoader(urls(folder), 2, SigmaSampling(), Reading(on_broken_sample="stop"), buffer=4) as loader,
        pytest.raises(BrokenSample, match="000000000004"),
    ):
        list(itertools.islice(loader, 200))


def test_what_is_known_of_a_folder_beforehand_is_its_manifest(tmp_path):
    folder, said = write_set(tmp_path / "encoded"), []
    streamed, indexed = StreamedSet(str(folder), said.append, tmp_path), ShardDataset(folder)
    assert sorted(streamed.urls) == urls(folder) and len(streamed) == len(indexed) and said == []
    assert (streamed.encoded, streamed.fingerprint) == (True, indexed.fingerprint)
    assert streamed.manifest == indexed.manifest and torch.equal(streamed.empty_prompt, indexed.empty_prompt)
    (folder / "empty_prompt.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match="run encode_shards"):
        StreamedSet(str(folder), said.append, tmp_path)


def test_without_a_manifest_the_first_samples_are_looked_at(tmp_path):
    folder, said = write_set(tmp_path / "images", payload="png"), []
    (folder / "manifest.json").unlink()
    for data in (str(folder), f"{folder}/{{000000..000001}}.tar", f"pipe:cat {folder}/000000.tar"):
        streamed = StreamedSet(data, said.append, tmp_path)
        (bucket,) = streamed.manifest.buckets
        assert (bucket.width, bucket.height, streamed.encoded, streamed.empty_prompt) == (32, 32, False, None)
        assert "takes 32×32" in said.pop() and len(streamed) == 0, "nobody knows how many"
    encoded = write_set(tmp_path / "encoded")
    (encoded / "manifest.json").unlink()
    with pytest.raises(ValueError, match="says for which model"):
        StreamedSet(str(encoded), said.append, tmp_path)
    (tmp_path / "nothing").mkdir()
    for nothing in ("nothing", "nowhere"):
        with pytest.raises(FileNotFoundError, match=f"{nothing} holds no shards"):
            StreamedSet(str(tmp_path / nothing), said.append, tmp_path)
