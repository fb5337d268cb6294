"""`--masked_loss` from shards to the LoRA: the loss by hand, one curve however it is split, nothing changed where it is off."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from data_prep import encode_shards, make_shards
from data_prep.images.stored_pixels import latent_mask
from demo.random_model import write_random_encoded, write_random_model
from qwen_image.model.conditioning import Prompt, pack_latents
from qwen_image.model.sizes import LATENT_CHANNELS
from qwen_image.noise_schedule import SigmaSchedule
from qwen_image.pipeline import QwenImagePipeline, predict_velocity
from tests.helpers.forked_ranks import import_once, run_ranks  # noqa: F401 (a fixture)
from train import train_lora
from train.data.mixture import Member, Mixture
from train.data.sample_order import Order
from train.data.shard_dataset import ShardDataset
from train.flow.objective import add_noise
from train.flow.timestep_sampling import SigmaSampling
from train.loader.indexed_loader import BatchLoader
from train.loader.webdataset_stream import StreamedSet, StreamLoader
from train.loader.worker_loader import Reading

ROOT = Path(__file__).resolve().parents[2]
STEPS = 4
MASKED = ["--masked_loss", "--mask_min_weight", "0.1"]


def train(command: list[str]) -> int:
    return train_lora.main(command)


def command(model: Path, data: Path, output: Path, *more: str, zero: str = "zero2", steps: int = STEPS) -> list[str]:
    return [
        *("--model", str(model), "--data", str(data), "--output_path", str(output), "--max_steps", str(steps)),
        *("--deepspeed", str(ROOT / "ds_configs" / f"{zero}.json"), "--dtype", "float32", "--lora_rank", "3"),
        *("--lora_target_modules", "to_q,to_k,img_mlp.net.2", "--learning_rate", "1e-2", "--num_workers", "0"),
        *("--log_steps", "1", "--save_steps", "0", "--wandb_mode", "disabled", "--validation_samples", "3"),
        *("--validation_steps", "0", *more),
    ]


def run(world: int, *arguments: object, **options: object) -> Path:
    asked = command(*arguments, **options)  # type: ignore[arg-type]
    assert run_ranks(world, train, asked) == 0
    return Path(asked[asked.index("--output_path") + 1])


def curve(output: Path, name: str = "loss") -> list[float]:
    rows = [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]
    return [row[name] for row in rows if name in row]


def assert_same_bits(one: Path, other: Path) -> None:
    for name in ("loss", "validation_loss"):
        assert curve(one, name) == curve(other, name), name
    weights = load_file(one / "lora.safetensors")
    assert all(torch.equal(tensor, weights[name]) for name, tensor in load_file(other / "lora.safetensors").items())


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("data") / "masked"
    return write_random_encoded(folder, 20, 32, 48, prompt_tokens=6, text_dim=64, buckets=2, masks=True)


@pytest.mark.parametrize("family", ["text-to-image", "edit-2509"])
def test_one_curve_and_an_exact_resume(small_model: Path, data: Path, family: str, tmp_path: Path) -> None:
    """Ranks, accumulation, ZeRO-2 and 3; pairs too, whose masks are the target's."""
    model = small_model
    if family != "text-to-image":
        model, data = tmp_path / "model", tmp_path / "data"
        write_random_model(model, layers=1, heads=1, text_dim=64, family=family)
        pairs = {"family": family, "sources": ((48, 32),), "picture_tokens": 4}
        write_random_encoded(data, 20, 32, 48, 6, 64, buckets=2, masks=True, **pairs)
    flags = [*MASKED, "--batch_size", "2"]
    whole = run(1, model, data, tmp_path / "whole", *flags, "--gradient_accumulation_steps", "2")
    for zero in ("zero2", "zero3"):
        other = run(2, model, data, tmp_path / zero, *flags, zero=zero)
        for name in ("loss", "validation_loss"):
            assert curve(other, name) == pytest.approx(curve(whole, name), rel=2e-6), (zero, name)
    moved = tmp_path / "moved"
    for steps in (2, STEPS):
        run(1, model, data, moved, *flags, "--gradient_accumulation_steps", "2", steps=steps)
    assert curve(moved) == curve(whole)
    weights = load_file(whole / "lora.safetensors")
    assert all(torch.equal(t, weights[name]) for name, t in load_file(moved / "lora.safetensors").items())


def test_without_the_option_masks_change_no_bit(
    small_model: Path, data: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    plain = write_random_encoded(tmp_path / "plain", 20, 32, 48, prompt_tokens=6, text_dim=64, buckets=2)
    without = run(1, small_model, plain, tmp_path / "without")
    assert "have masks" not in capfd.readouterr().out
    unused = run(1, small_model, data, tmp_path / "unused")
    assert "13 samples have masks, which are not used without --masked_loss" in capfd.readouterr().out
    assert_same_bits(without, unused)
    used = run(1, small_model, data, tmp_path / "used", *MASKED)
    assert "masked loss: 13 samples have masks, outside of which the loss weighs 0.1; 7 have none" in (
        capfd.readouterr().out
    )
    assert curve(used) != curve(unused) and curve(used, "validation_loss") != curve(unused, "validation_loss")
    assert json.loads(next((used / "checkpoints").glob("step-*/*.json")).read_text())["client"]["config"]["masked_loss"]


def test_a_set_without_masks_is_refused(small_model: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    plain = write_random_encoded(tmp_path / "plain", 6, 32, 48, prompt_tokens=6, text_dim=64)
    asked = command(small_model, plain, tmp_path / "run", "--masked_loss")
    assert run_ranks(1, train, asked) == 2
    said = capfd.readouterr().err
    assert "has no masks" in said and "make_shards.py" in said and "encode_shards.py" in said
    assert not (tmp_path / "run").exists()


# ── images and encoded shards ────────────────────────────────────────────────────────────────────────────────────────


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Ten pictures in two buckets, most with soft masks of their own."""
    photos, shards = tmp_path_factory.mktemp("photos"), tmp_path_factory.mktemp("images") / "shards"
    rng = np.random.default_rng(0)
    for number in range(10):
        size = (96, 64) if number % 2 else (64, 64)
        corners = rng.integers(0, 256, (3, 3, 3), dtype=np.uint8)
        Image.fromarray(corners).resize(size, Image.Resampling.BICUBIC).save(photos / f"{number}.png")
        (photos / f"{number}.txt").write_text("soft colours " * (1 + number % 3))
        if number % 4:
            mask = Image.fromarray(rng.integers(0, 256, (4, 4), dtype=np.uint8))
            mask.resize(size, Image.Resampling.BICUBIC).save(photos / f"{number}-masklabel.png")
    flags = ["--dataset_base_path", str(photos), "--output_path", str(shards), "--max_pixels", "6144"]
    assert make_shards.main([*flags, "--num_workers", "0"]) == 0
    return shards


@pytest.fixture(scope="module")
def encoded(images: Path, tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp("data") / "encoded"
    flags = ["--model", str(tiny_model), "--data", str(images), "--output_path", str(output), "--dtype", "float32"]
    assert encode_shards.main(flags) == 0
    return output


def test_images_have_the_masks_of_encoded_shards(images: Path, encoded: Path) -> None:
    """Bit for bit, samples and batches; white where there is none; nothing is read where masks aren't wanted."""
    here, there = ShardDataset(images, masks=True), ShardDataset(encoded, masks=True)
    assert here.masked == there.masked == 7 and len(here) == 10
    for index in range(10):
        mask = here.read(index).mask
        assert mask is not None and torch.equal(mask, there.read(index).mask)
        assert (mask.min() == 255) == (here.index.mask_share[index] < 0)
        assert ShardDataset(images).read(index).mask is None and ShardDataset(encoded).read(index).mask is None
    order = Order(here.index.bucket, here.index.shard, 2, 0)
    with BatchLoader(here, order, SigmaSampling()) as loader:
        batch = next(iter(loader))
    assert batch.mask is not None and batch.mask.shape == (2, batch.height // 8, batch.width // 8)
    for row, index in enumerate(batch.indices):
        assert torch.equal(batch.mask[row], here.read(index % 10).mask)


def test_online_equals_encoded(tiny_model: Path, images: Path, encoded: Path, tmp_path: Path) -> None:
    online = run(1, tiny_model, images, tmp_path / "online", *MASKED)
    stored = run(1, tiny_model, encoded, tmp_path / "stored", *MASKED)
    for name in ("loss", "validation_loss"):  # a caption encoded in another batch can round to the other neighbor
        assert curve(online, name) == pytest.approx(curve(stored, name), rel=5e-5)
    assert curve(online)[0] == pytest.approx(curve(stored)[0], rel=1e-6)


def test_the_first_loss_by_hand(tiny_model: Path, encoded: Path, tmp_path: Path) -> None:
    """Σ w·e²/Σ w of the base's own prediction, element by element: the LoRA's second matrix is still 0."""
    output = run(1, tiny_model, encoded, tmp_path / "run", *MASKED, "--timestep_sampling", "uniform", steps=1)
    dataset = ShardDataset(encoded, 3, masks=True)
    sampling = SigmaSampling("uniform", schedule=SigmaSchedule())
    with BatchLoader(dataset, dataset.order(1, 0), sampling) as loader:
        batch = next(iter(loader))
    assert batch.latents is not None and batch.prompt_embeds is not None and batch.mask is not None
    pipeline = QwenImagePipeline.from_pretrained(str(tiny_model), components=("transformer",), dtype=torch.float32)
    noised = pack_latents(add_noise(batch.latents, batch.noise, batch.sigma))
    prompt = Prompt(batch.prompt_embeds.float(), batch.prompt_mask)
    rows, columns = batch.height // 16, batch.width // 16
    with torch.no_grad():
        prediction = predict_velocity(pipeline.transformer, noised, batch.sigma, prompt, rows, columns)
    error = (prediction - pack_latents(batch.noise - batch.latents.float())) ** 2
    weighted = weights = 0.0
    for row in range(rows):
        for column in range(columns):
            for down in range(2):
                for right in range(2):
                    m = batch.mask[0, 2 * row + down, 2 * column + right].item() / 255
                    w = 0.1 + 0.9 * m
                    elements = error[0, row * columns + column].view(LATENT_CHANNELS, 2, 2)[:, down, right]
                    weighted += w * elements.double().sum().item()
                    weights += w * LATENT_CHANNELS
    assert curve(output)[0] == pytest.approx(weighted / weights, rel=1e-5)


@pytest.mark.parametrize("kind", ["images", "encoded"])
def test_a_stream_has_masks_too(request: pytest.FixtureRequest, kind: str, tmp_path: Path) -> None:
    """Those of the indexed set by key; in a run of the trainer; and of plain shards without a manifest."""
    folder = request.getfixturevalue(kind)
    dataset, stream = ShardDataset(folder, masks=True), StreamedSet(str(folder), print, tmp_path)
    assert stream.masked == 7
    keys = {dataset.read(index).key: dataset.read(index).mask for index in range(10)}
    sampling = SigmaSampling()
    for wanted in (True, False):
        reading = Reading(masks=wanted)
        with StreamLoader(stream.urls, 2, sampling, reading, empty_prompt=stream.empty_prompt) as loader:
            for _, batch in zip(range(4), loader, strict=False):
                assert (batch.mask is not None) == wanted
                for row, key in enumerate(batch.keys if wanted else []):
                    assert torch.equal(batch.mask[row], keys[key])
    if kind == "images":
        assert StreamedSet(f"{folder}/000000.tar", print, tmp_path).masked == 7


def test_a_stream_trains(tiny_model: Path, encoded: Path, tmp_path: Path) -> None:
    flags = command(tiny_model, encoded, tmp_path / "run", *MASKED, "--loader", "webdataset", steps=2)
    flags[flags.index("--validation_samples") + 1] = "0"
    assert run_ranks(1, train, flags) == 0 and len(curve(tmp_path / "run")) == 2


def test_a_damaged_mask_is_a_broken_sample(images: Path, tmp_path: Path) -> None:
    import shutil

    folder = shutil.copytree(images, tmp_path / "damaged")
    dataset = ShardDataset(folder, masks=True)
    index = int(np.flatnonzero(dataset.index.mask_size > 0)[0])
    tar = folder / "000000.tar"
    content = bytearray(tar.read_bytes())
    content[int(dataset.index.mask_offset[index]) + 45] ^= 0xFF
    tar.write_bytes(content)
    from train.data.sample import BrokenSample

    with pytest.raises(BrokenSample, match="mask: "):
        ShardDataset(folder, masks=True).read(index)
    assert ShardDataset(folder).read(index).pixels is not None, "without masks nobody looks at it"


def test_the_grid_is_that_of_the_vae() -> None:
    """A white pixel weighs where its latent is."""
    mask = np.zeros((64, 96), np.uint8)
    mask[17, 40] = 255
    grid = latent_mask(mask)
    assert np.argwhere(grid).tolist() == [[2, 5]] and grid[2, 5] == 4


def test_a_mixture_has_the_masks_of_its_sets(small_model: Path, data: Path, tmp_path: Path) -> None:
    plain = write_random_encoded(tmp_path / "plain", 8, 32, 48, prompt_tokens=6, text_dim=64)
    mixture = Mixture([Member(ShardDataset(plain, masks=True)), Member(ShardDataset(data, masks=True), 0.5)])
    own = ShardDataset(data, masks=True)
    assert mixture.masked == 13 and mixture.read(0).mask.min() == 255
    assert torch.equal(mixture.read(8 + 1).mask, own.read(1).mask) and own.index.mask_share[1] > 0
    flags = command(small_model, plain, tmp_path / "run", "--data", f"{data}:0.5", *MASKED, steps=2)
    flags[flags.index("--validation_samples") + 1] = "0"
    assert run_ranks(1, train, flags) == 0 and len(curve(tmp_path / "run")) == 2
