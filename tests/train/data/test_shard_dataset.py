"""Samples, batches and the loader, on data sets of a few tiny samples written here."""

import itertools
import multiprocessing
import os
import pickle
import signal
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import safetensors.torch
import torch

from data_prep.shard_format.shards import (
    EMPTY_PROMPT,
    read_manifest,
    sample_key,
    write_manifest,
)
from qwen_image.model.conditioning import Prompt
from tests.helpers.data_sets import SIZES, assert_equal, break_sample, embeds_of, latent_of, pixels_of, write_set
from train.data.batch import Batch, collate, make_batch
from train.data.draws import Draws, sample_draws
from train.data.sample import BrokenSample
from train.data.shard_dataset import ShardDataset
from train.flow.timestep_sampling import SigmaSampling
from train.loader.indexed_loader import BatchLoader
from train.loader.worker_loader import Reading


@pytest.fixture
def encoded(tmp_path: Path) -> Path:
    return write_set(tmp_path / "encoded")


def draw(epoch: int, index: int, shape: tuple[int, ...], dropout: float = 0.0, seed: int = 0) -> Draws:
    return sample_draws(seed, epoch, index, shape, SigmaSampling(), dropout)


def taken(folder: Path, count: int, batch_size: int = 2, **options) -> list[Batch]:
    dataset = ShardDataset(folder)
    order = dataset.order(batch_size, seed=3)
    with BatchLoader(dataset, order, SigmaSampling(), Reading(**options)) as loader:
        return list(itertools.islice(loader, count))


# ── samples ──────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_every_sample_reads_back_as_written(encoded):
    dataset = pickle.loads(pickle.dumps(ShardDataset(encoded)))
    for number in range(12):
        sample = dataset.read(number)
        assert (sample.key, sample.caption) == (sample_key(number // 5, number % 5), f"caption {number} é")
        assert (sample.width, sample.height) == SIZES[number % 2] == dataset.size(number)
        assert torch.equal(sample.latent, latent_of(number)) and torch.equal(sample.prompt_embeds, embeds_of(number))
        assert dataset.source(number) == f"photos/{number}.jpg"
    assert dataset.encoded and dataset.fingerprint == "f" * 64 and dataset.empty_prompt.shape == (5, 8)


def test_a_stored_standard_deviation_is_passed_over(encoded):
    """encode_shards.py --latent_std writes it beside the mode, which is what is trained."""
    from train.data.sample import read_encoded

    tensors = {"latent": latent_of(0), "prompt_embeds": embeds_of(0), "latent_std": latent_of(0).abs() + 1}
    found = read_encoded(safetensors.torch.save(tensors), 8)
    assert torch.equal(found.latent, latent_of(0)) and torch.equal(found.prompt_embeds, embeds_of(0))


@pytest.mark.parametrize("payload", ["jpg", "png"])
def test_images_decode_to_rgb_channels_first(tmp_path, payload):
    dataset = ShardDataset(write_set(tmp_path / "images", payload=payload))
    for number in range(4):
        sample = dataset.read(number)
        expected = torch.from_numpy(pixels_of(number)).permute(2, 0, 1)
        assert sample.pixels.dtype == torch.uint8 and sample.pixels.shape == expected.shape
        error = (sample.pixels.int() - expected.int()).abs()
        assert error.max() == 0 if payload == "png" else error.float().mean() < 4
        assert sample.caption == f"caption {number} é" and sample.latent is None


def test_long_prompts_are_cut_as_the_pipeline_does(encoded):
    sample = ShardDataset(encoded, max_prompt_tokens=6).read(3)
    assert torch.equal(sample.prompt_embeds, embeds_of(3)[:6])


def test_validation_samples_are_held_out_and_chosen_by_name(encoded, tmp_path):
    dataset = ShardDataset(encoded, validation_samples=4)
    images = ShardDataset(write_set(tmp_path / "images", payload="png", shard_size=12), validation_samples=4)
    assert dataset.validation.tolist() == images.validation.tolist() and len(dataset.validation) == 4
    assert set(ShardDataset(encoded, validation_samples=2).validation) < set(dataset.validation)
    assert sorted([*dataset.training, *dataset.validation]) == list(range(12))
    trained = dataset.order(2).plan(0) % 12
    assert not set(trained.ravel()) & set(dataset.validation)
    with pytest.raises(ValueError, match="12 samples, validation_samples=12"):
        ShardDataset(encoded, validation_samples=12)


def test_what_is_missing_is_named(encoded, tmp_path):
    with pytest.raises(FileNotFoundError, match="no folder at"):
        ShardDataset(tmp_path / "nothing")
    (encoded / EMPTY_PROMPT).unlink()
    with pytest.raises(FileNotFoundError, match=r"empty_prompt\.safetensors is missing"):
        ShardDataset(encoded)


# ── batches ──────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_a_batch_holds_what_its_samples_hold(encoded):
    dataset = ShardDataset(encoded)
    batch = make_batch(dataset, 7, 2, [2, 4, 2 + 12], partial(draw, dropout=0.0))
    assert batch.latents.shape == batch.noise.shape == (3, 16, 1, 2, 4) and (batch.width, batch.height) == (32, 16)
    assert torch.equal(batch.latents[:, 0, 0, 0, 0], torch.tensor([2.0, 4.0, 2.0], dtype=torch.bfloat16))
    assert batch.prompt_embeds.shape == (3, 7, 8)
    assert batch.prompt_mask.sum(1).tolist() == [7, 5, 7]
    assert (batch.prompt_embeds[~batch.prompt_mask] == 0).all()
    assert torch.equal(batch.prompt_embeds[1, :5], embeds_of(4))
    assert not torch.equal(batch.noise[0], batch.noise[2]), "a repeated sample must get noise of its own"
    for row, index in enumerate([2, 4, 14]):
        expected = draw(2, index, (16, 2, 4))
        assert torch.equal(batch.noise[row, :, 0], expected.noise)
        assert batch.sigma[row].item() == pytest.approx(expected.sigma)
    assert batch.captions == ["caption 2 é", "caption 4 é", "caption 2 é"]
    assert (batch.place, batch.epoch, batch.indices) == (7, 2, [2, 4, 14])


def test_no_padding_no_mask_and_rounding_up():
    prompts = [torch.ones(5, 2), torch.ones(5, 2)]
    assert Prompt.from_list(prompts)[1] is None
    embeds, mask, _ = Prompt.from_list(prompts, text_padding=8)
    assert embeds.shape == (2, 8, 2) and mask.sum(1).tolist() == [5, 5]
    assert Prompt.from_list([torch.ones(8, 2)], text_padding=8)[1] is None


def test_a_dropped_caption_becomes_the_empty_prompt_not_zeros(encoded):
    dataset = ShardDataset(encoded)
    samples = [dataset.read(1), dataset.read(3)]
    draws = [Draws(torch.zeros(16, 4, 2), 0.5, drop) for drop in (True, False)]
    tensors = collate(samples, draws, dataset.empty_prompt)
    assert tensors["captions"] == ["", "caption 3 é"] and tensors["drop"].tolist() == [True, False]
    assert (tensors["prompt_embeds"][0, :5] == -1).all() and (tensors["prompt_embeds"][0, 5:] == 0).all()
    assert tensors["prompt_mask"].sum(1).tolist() == [5, 8]


def test_caption_dropout_has_its_rate_and_changes_with_the_epoch(encoded):
    dataset = ShardDataset(encoded)
    drops = np.array(
        [
            make_batch(dataset, 0, epoch, range(0, 12, 2), partial(draw, dropout=0.25)).drop.tolist()
            for epoch in range(60)
        ]
    )
    assert 0.15 < drops.mean() < 0.35 and (drops[0] != drops[1:]).any()


def test_moving_a_batch_moves_every_tensor_but_sigma(encoded):
    batch = make_batch(ShardDataset(encoded), 0, 0, [2, 4], draw)
    moved = batch.to("meta")
    tensors = {name for name, value in vars(batch).items() if isinstance(value, torch.Tensor)}
    assert tensors == {"noise", "sigma", "drop", "latents", "prompt_embeds", "prompt_mask"}
    assert {name for name in tensors if getattr(moved, name).device.type == "meta"} == tensors - {"sigma"}
    assert moved.keys == batch.keys


# ── broken members ───────────────────────────────────────────────────────────────────────────────────────────────────


def test_a_broken_sample_is_named_counted_and_replaced(encoded):
    break_sample(encoded, 4)
    dataset = ShardDataset(encoded)
    with pytest.raises(BrokenSample, match=r"^000000000004 in .*000000\.tar: "):
        dataset.read(4)
    batch = make_batch(dataset, 0, 0, [4, 8], draw)
    assert batch.keys == ["000001000001", "000001000003"] and batch.indices == [4, 8]
    assert torch.equal(batch.noise[0, :, 0], draw(0, 4, (16, 2, 4)).noise), "the draws stay those of the place"
    assert len(batch.broken) == 1 and "000000000004" in batch.broken[0]
    said: list[str] = []
    with BatchLoader(dataset, dataset.order(2, seed=3), SigmaSampling(), Reading(say=said.append)) as loader:
        batches = list(itertools.islice(loader, 2 * loader.order.length))
    assert loader.broken == 2 == sum(len(batch.broken) for batch in batches)
    assert len(said) == 1 and said[0].startswith("broken sample replaced by its neighbour: 000000000004 in ")


@pytest.mark.parametrize("workers", [0, 1])
def test_on_broken_sample_stop_raises_one_line(encoded, workers):
    break_sample(encoded, 4)
    with pytest.raises(BrokenSample, match="000000000004") as caught:
        taken(encoded, 6, num_workers=workers, on_broken_sample="stop")
    assert "\n" not in str(caught.value)


def test_a_data_set_that_is_all_broken_ends_the_run(encoded):
    for number in range(12):
        break_sample(encoded, number)
    with pytest.raises(BrokenSample, match="no other sample can be read"):
        make_batch(ShardDataset(encoded), 0, 0, [0, 2], draw)
    with pytest.raises(BrokenSample, match="3 samples after a broken one are broken too"):
        make_batch(ShardDataset(encoded), 0, 0, [0, 2], draw, attempts=3)


@pytest.mark.parametrize("batch_size", [1, 3])
def test_a_bucket_without_a_readable_sample_gives_way_to_another(tmp_path, batch_size):
    """Sample 1 of 2 is alone in its bucket; the batch keeps its place and its noise's index, equal in every process."""
    folder = write_set(tmp_path / "two", samples=2)
    break_sample(folder, 1)
    dataset = ShardDataset(folder)
    batch = make_batch(dataset, 7, 0, [1] * batch_size, draw)
    assert batch.keys == [sample_key(0, 0)] * batch_size and (batch.width, batch.height) == SIZES[0]
    assert batch.latents.shape == (batch_size, 16, 1, SIZES[0][1] // 8, SIZES[0][0] // 8) == batch.noise.shape
    assert len(batch.broken) == 1 and batch.broken[0].startswith(sample_key(0, 1)) and batch.indices == [1] * batch_size
    assert_equal(batch, make_batch(pickle.loads(pickle.dumps(dataset)), 7, 0, [1] * batch_size, draw))
    said: list[str] = []
    with BatchLoader(dataset, dataset.order(1), SigmaSampling(), Reading(say=said.append)) as loader:
        assert len(list(itertools.islice(loader, 6))) == 6 and loader.broken == 3
    assert len(said) == 1
    break_sample(folder, 0)
    with pytest.raises(BrokenSample, match=r"no other sample can be read \(check_shards\.py lists them\): 0000000000"):
        make_batch(ShardDataset(folder), 7, 0, [1], draw)
    with pytest.raises(BrokenSample, match=r"^000000000001"):
        make_batch(ShardDataset(folder), 7, 0, [1], draw, attempts=0)


def test_a_truncated_shard_is_a_broken_sample(encoded):
    with open(encoded / "000002.tar", "r+b") as file:
        file.truncate(600)
    with pytest.raises(BrokenSample, match=r"000002\.tar.*truncated"):
        ShardDataset(encoded).read(11)


def test_an_image_of_another_size_than_its_bucket_is_broken(tmp_path):
    folder = write_set(tmp_path / "images", payload="png")
    swapped = read_manifest(folder)
    write_manifest(folder, replace(swapped, buckets=[replace(b, id=1 - b.id) for b in swapped.buckets]))
    with pytest.raises(BrokenSample, match="image is 32x16, its bucket 16x32"):
        ShardDataset(folder).read(0)


# ── the loader ───────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("workers", [1, 3])
def test_workers_change_nothing(encoded, workers):
    here, there = taken(encoded, 9), taken(encoded, 9, num_workers=workers)
    for a, b in zip(here, there, strict=True):
        assert_equal(a, b)


def test_two_ranks_see_what_one_rank_with_accumulation_sees(encoded):
    alone = taken(encoded, 12, accumulation=2, caption_dropout=0.3)
    ranks = [taken(encoded, 6, rank=rank, world=2, caption_dropout=0.3) for rank in range(2)]
    for a, b in zip(alone, [batch for pair in zip(*ranks, strict=True) for batch in pair], strict=True):
        assert_equal(a, b)


def test_state_counts_steps_taken_not_batches_read(encoded):
    dataset = ShardDataset(encoded)
    order = dataset.order(2, seed=3)
    whole = taken(encoded, 12, accumulation=2)
    with BatchLoader(dataset, order, SigmaSampling(), Reading(accumulation=2, num_workers=1)) as loader:
        batches = iter(loader)
        for _ in range(2):
            next(batches), next(batches)
            loader.stepped()
        next(batches)  # read, but its step is not taken
        state = loader.state()
    assert state["consumed"] == 4 and loader.epoch == pytest.approx(4 / order.length)
    assert state["order"]["seed"] == 3 and state["order"]["batch_size"] == 2
    resumed = taken(encoded, 8, accumulation=2, consumed=state["consumed"])
    for a, b in zip(whole[4:], resumed, strict=True):
        assert_equal(a, b)


def test_iterating_twice_goes_on(encoded):
    dataset = ShardDataset(encoded)
    with BatchLoader(dataset, dataset.order(2), SigmaSampling()) as loader:
        assert [next(iter(loader)).place for _ in range(3)] == [0, 1, 2]


def test_a_signal_to_the_whole_job_leaves_the_workers_alive(encoded):
    """Slurm signals every process; the training process wants to finish its step and save."""
    dataset, others = ShardDataset(encoded), set(multiprocessing.active_children())
    with BatchLoader(dataset, dataset.order(2), SigmaSampling(), Reading(num_workers=2)) as loader:
        workers = set(multiprocessing.active_children()) - others  # they have only just begun
        assert len(workers) == 2
        for worker in workers:
            os.kill(worker.pid, signal.SIGTERM)
            os.kill(worker.pid, signal.SIGUSR1)
        batches = iter(loader)
        places = [next(batches).place for _ in range(31)]
    assert places == list(range(31))
    assert not any(worker.is_alive() for worker in workers)
