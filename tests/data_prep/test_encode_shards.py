"""Encoded shards: the right tensors, the same bytes whoever made them, restartable, never mixed."""

import dataclasses
import hashlib
import json
import re
import shutil

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image
from safetensors.torch import load, load_file

from data_prep import check_shards, encode_shards, make_shards
from data_prep.encoding import encoders as encoders_file
from data_prep.encoding.encoders import Encoders
from data_prep.images.stored_pixels import decode_stored
from data_prep.packing.output_folder import LOCKS, output_lock
from data_prep.shard_format.scan_tars import build_index
from data_prep.shard_format.shards import ShardReader, read_index, read_manifest
from qwen_image.encoders.vae import pixels_from_uint8
from qwen_image.pipeline import QwenImagePipeline

CAPTIONS = ["one caption", "another one", "one caption", ""]


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    """20 samples in 3 shards and 2 buckets."""
    folder = tmp_path_factory.mktemp("photos")
    rng = np.random.default_rng(1)
    for number in range(20):
        size = (96, 64) if number % 3 else (64, 96)
        Image.fromarray(rng.integers(0, 256, (*size[::-1], 3), dtype=np.uint8)).save(folder / f"{number:02d}.png")
        (folder / f"{number:02d}.txt").write_text(CAPTIONS[number % 4])
    shards = tmp_path_factory.mktemp("data") / "shards"
    arguments = ["--dataset_base_path", str(folder), "--output_path", str(shards), "--max_pixels", "6144"]
    arguments += ["--num_workers", "0", "--samples_per_shard", "8", "--on_missing_caption", "empty"]
    assert make_shards.main(arguments) == 0
    return shards


def encode(model, images, output, *more):
    arguments = ["--model", str(model), "--data", str(images), "--output_path", str(output), "--dtype", "float32"]
    return encode_shards.main([*arguments, *more])


@pytest.fixture(scope="module")
def encoded(images, tiny_model, tmp_path_factory):
    output = tmp_path_factory.mktemp("data") / "encoded"
    assert encode(tiny_model, images, output, "--latent_std") == 0
    return output


def hashes(folder):
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in sorted(folder.iterdir())}


def test_tensors_are_those_of_the_pipeline(images, encoded, tiny_model):
    pipeline = QwenImagePipeline.from_pretrained(
        str(tiny_model), components=("vae", "text_encoder"), dtype=torch.float32
    )
    source, target = read_index(images), read_index(encoded)
    sizes = {bucket.id: (bucket.width, bucket.height) for bucket in read_manifest(images).buckets}
    assert target.key.tolist() == source.key.tolist() and target.bucket.tolist() == source.bucket.tolist()
    readers = ShardReader(images), ShardReader(encoded)
    for row in range(len(source)):
        shard = int(source.shard[row])
        data, member, text = (
            reader.read(shard, int(offset[row]), int(size[row]))
            for reader, offset, size in (
                (readers[0], source.payload_offset, source.payload_size),
                (readers[1], target.payload_offset, target.payload_size),
                (readers[1], target.txt_offset, target.txt_size),
            )
        )
        tensors = load(member)
        pixels = torch.from_numpy(decode_stored(data, *sizes[int(source.bucket[row])]).copy()).permute(2, 0, 1)[None]
        latent = pipeline.vae.encode(pixels_from_uint8(pixels))[0, :, 0]
        torch.testing.assert_close(tensors["latent"].float(), latent, atol=0.02, rtol=0.01)
        embeds = pipeline.text_encoder.encode_list([text.decode()])[0]
        assert tensors["prompt_embeds"].shape == embeds.shape and len(embeds) == target.prompt_tokens[row]
        torch.testing.assert_close(tensors["prompt_embeds"].float(), embeds, atol=0.02, rtol=0.01)
        assert tensors["latent"].dtype == tensors["prompt_embeds"].dtype == torch.bfloat16
        assert tensors["latent_std"].shape == tensors["latent"].shape and (tensors["latent_std"] > 0).all()


def test_manifest_and_empty_prompt(images, encoded, tiny_model):
    manifest = read_manifest(encoded)
    assert manifest.payload == "safetensors" and manifest.totals["samples"] == 20
    assert manifest.encoding["model"] == tiny_model.name and manifest.encoding["template_drop"] == 34
    assert manifest.fingerprint != read_manifest(images).fingerprint
    assert load_file(encoded / "empty_prompt.safetensors")["prompt_embeds"].shape[0] == 5


def test_ranks_and_restarts_write_the_same_bytes(images, encoded, tiny_model, tmp_path, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    for rank in ("1", "0"):
        monkeypatch.setenv("RANK", rank)
        assert encode(tiny_model, images, tmp_path / "two", "--latent_std", "--num_workers", "1") == 0
    assert hashes(tmp_path / "two") == hashes(encoded)
    monkeypatch.delenv("RANK")
    monkeypatch.delenv("WORLD_SIZE")

    part = shutil.copytree(encoded, tmp_path / "part")  # what a kill leaves: no commit mark, no manifest
    for name in ("000001_stats.json", "manifest.json", "index.parquet", "sizes.json"):
        (part / name).unlink()
    (part / "000001.tar").write_bytes(b"half a shard")
    untouched = (part / "000000.tar").stat().st_mtime_ns
    assert encode(tiny_model, images, part, "--latent_std") == 0
    assert hashes(part) == hashes(encoded) and (part / "000000.tar").stat().st_mtime_ns == untouched


def test_each_caption_is_encoded_once(images, tiny_model, tmp_path, monkeypatch):
    from qwen_image.encoders.text_encoder import TextEncoder

    seen = []
    original = TextEncoder.encode_list
    monkeypatch.setattr(
        TextEncoder, "encode_list", lambda self, captions, *a: seen.extend(captions) or original(self, captions, *a)
    )
    assert encode(tiny_model, images, tmp_path / "out", "--batch_size", "3") == 0
    assert sorted(seen) == sorted(set(CAPTIONS))


def test_another_model_or_option_is_not_mixed_in(images, encoded, tiny_model, capsys):
    before = hashes(encoded)
    assert encode(tiny_model, images, encoded) == 2
    assert "latent_std True there, False here" in capsys.readouterr().err
    assert hashes(encoded) == before


def test_image_shards_packed_again_with_other_content_are_not_mixed_in(images, encoded, tiny_model, tmp_path, capsys):
    edited = shutil.copytree(
        images, tmp_path / "edited"
    )  # paths, sizes and captions, so the fingerprint, stay the same
    manifest = json.loads((edited / "manifest.json").read_text())
    manifest["shards"][0]["sha256"] = "0" * 64
    (edited / "manifest.json").write_text(json.dumps(manifest))
    assert encode(tiny_model, edited, encoded, "--latent_std") == 2
    assert "holds shards of another set: its image shards had other content" in capsys.readouterr().err


@pytest.mark.parametrize(
    "arguments,message",
    [
        (lambda images, encoded: {"images": encoded}, "holds encoded shards already"),
        (lambda images, encoded: {"images": images.parent / "nothing"}, "is not a finished data set"),
        (lambda images, encoded: {"output": images}, "did not write; choose another folder"),
        (lambda images, encoded: {"model": "/no/model"}, "model folder /no/model does not exist"),
        (lambda images, encoded: {"output": "/proc/out"}, "/proc/out"),
    ],
    ids=["encoded", "missing", "image folder", "model", "unwritable"],
)
def test_bad_input_is_one_line(images, encoded, tiny_model, tmp_path, capsys, arguments, message):
    options = {"model": tiny_model, "images": images, "output": tmp_path / "out"} | arguments(images, encoded)
    assert encode(**options) == 2
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert error.startswith("error: ") and message in error


def test_a_broken_image_is_named(images, tiny_model, tmp_path, capsys):
    broken = shutil.copytree(images, tmp_path / "broken")
    index = read_index(broken)
    with (broken / "000000.tar").open("r+b") as file:
        file.seek(int(index.payload_offset[2]))
        file.write(bytes(200))
    assert encode(tiny_model, broken, tmp_path / "out") == 2
    error = capsys.readouterr().err
    assert "--on_broken_sample skip" in error
    assert f"{index.key[2]} in 000000.tar (" in error and json.dumps(str(index.path[2])).strip('"') in error

    assert encode(tiny_model, broken, tmp_path / "out", "--on_broken_sample", "skip") == 0  # goes on from the stop
    written, counted = capsys.readouterr()
    assert f"left out: {index.key[2]} in 000000.tar" in counted and "1 samples left out" in written
    left, manifest = read_index(tmp_path / "out"), read_manifest(tmp_path / "out")
    assert left.key.tolist() == [key for key in index.key.tolist() if key != index.key[2]]
    assert manifest.totals["failed"] == 1 and manifest.totals["samples"] == len(left) == 19
    assert sum(bucket.count for bucket in manifest.buckets) == 19
    table = pq.read_table(tmp_path / "out" / "000000.parquet").to_pylist()
    assert [row["key"] for row in table if row["status"] == "failed"] == [index.key[2]]
    assert check_shards.main([str(tmp_path / "out"), "--num_workers", "0"]) == 0


def test_a_finished_set_loads_no_encoder(images, encoded, tiny_model, capsys, monkeypatch):
    monkeypatch.setattr(Encoders, "load", None)
    before = hashes(encoded)
    assert encode(tiny_model, images, encoded, "--latent_std") == 0
    assert "nothing to do" in capsys.readouterr().out and hashes(encoded) == before


def test_check_and_report_of_an_encoded_set(encoded, tmp_path, capsys):
    report = tmp_path / "report.html"
    assert check_shards.main([str(encoded), "--num_workers", "0", "--report", str(report)]) == 0
    assert "20 safetensors samples in 3 shards" in capsys.readouterr().out
    page = report.read_text()
    assert "latents and prompt embeddings" in page and "another one" in page and "posterior mode" in page


def test_shards_made_elsewhere(images, tiny_model, tmp_path):
    foreign = tmp_path / "foreign"
    foreign.mkdir()
    shutil.copy(images / "000001.tar", foreign / "train-a.tar")
    build_index(foreign)
    assert encode(tiny_model, foreign, tmp_path / "out") == 0
    assert read_index(tmp_path / "out").key.tolist() == read_index(foreign).key.tolist()
    assert check_shards.main([str(tmp_path / "out"), "--num_workers", "0"]) == 0


def test_captions_of_like_length_share_a_batch_and_the_cache_is_bounded(monkeypatch):
    batches = []

    class TextEncoder:
        def encode_list(self, captions):
            batches.append([len(caption) for caption in captions])
            return [torch.zeros(len(caption), 4) for caption in captions]

    encoders = Encoders(None, TextEncoder(), latent_std=False)
    captions = ["x" * length for length in (9, 1, 8, 2, 9)]
    found = encoders.encode_captions(captions, 2)
    assert batches == [[1, 2], [8, 9]] and {len(text): len(tensor) for text, tensor in found.items()} == {
        1: 1, 2: 2, 8: 8, 9: 9
    }  # fmt: skip
    monkeypatch.setattr(encoders_file, "CACHE_BYTES", 100)
    encoders.encode_captions(["x"], 2)
    assert batches == [[1, 2], [8, 9]]
    encoders.encode_captions(["x", "x" * 8], 2)  # x was used lately and stayed, 8 had to go
    assert batches == [[1, 2], [8, 9], [8]]


def test_long_captions_are_counted_and_named(tiny_model, tmp_path, capsys):
    """8,000 words are cut by the encoder, 600 only by training's own limit; a damaged encoding.json is written again."""
    folder = tmp_path / "photos"
    folder.mkdir()
    words = {"short": "a cat", "long": "cat " * 600, "longest": "cat " * 8000}
    for name, text in words.items():
        Image.fromarray(np.zeros((64, 64, 3), np.uint8)).save(folder / f"{name}.png")
        (folder / f"{name}.txt").write_text(text)
    images, output = tmp_path / "images", tmp_path / "encoded"
    flags = ["--dataset_base_path", str(folder), "--output_path", str(images), "--max_pixels", "4096"]
    assert make_shards.main([*flags, "--num_workers", "0"]) == 0
    printed = capsys.readouterr().out
    assert "1 captions are longer than the 1,024 tokens" in printed and "first longest.png" in printed
    assert encode(tiny_model, images, output) == 0
    printed = capsys.readouterr().out
    tokens = re.search(
        r"warning: 1 captions are longer .* first longest.png \(its caption of (\d+) tokens is cut at 1024\)", printed
    )
    assert tokens and int(tokens[1]) > 1024
    assert re.search(r"[12] captions have more than 512 tokens, .*--max_prompt_tokens", printed)
    (output / "encoding.json").write_text("{")
    (output / "000000_stats.json").write_text("")
    assert encode(tiny_model, images, output) == 0
    assert "encoding.json is damaged: written again" in capsys.readouterr().out


def test_training_says_which_captions_it_cuts(tmp_path):
    from tests.helpers.data_sets import write_set
    from train.data.shard_dataset import ShardDataset
    from train.loader.from_config import cut_captions

    dataset = ShardDataset(write_set(tmp_path / "set"))
    assert cut_captions(dataset, 512) is None
    tokens = dataset.index.prompt_tokens.copy()
    tokens[[3, 5]] = 700, 800
    dataset.index = dataclasses.replace(dataset.index, prompt_tokens=tokens)
    line = cut_captions(dataset, 512)
    assert "2 captions are longer than max_prompt_tokens=512" in line and "photos/3.jpg" in line
    assert line.endswith("--max_prompt_tokens 800 would hold them")
    images = ShardDataset(write_set(tmp_path / "images", payload="jpg"))
    lengths = images.index.caption_length.copy()
    lengths[2] = 9000
    images.index = dataclasses.replace(images.index, caption_length=lengths)
    assert "probably about 2250 tokens at most" in cut_captions(images, 1024)
    assert "reads no more than 1024: shorten them" in cut_captions(images, 1024)


def test_a_second_encoder_is_refused_with_the_first_one_s_name(images, encoded, tiny_model, tmp_path, capsys):
    output = tmp_path / "encoded"
    with output_lock(output / LOCKS, "encoding", 0, 1):
        (output / ".partial-000000.tar.elsewhere.1").write_bytes(b"the first one's work")
        assert encode(tiny_model, images, output, "--latent_std") == 2
        assert "(encoding, task 0 of 1" in capsys.readouterr().err
        assert (output / ".partial-000000.tar.elsewhere.1").is_file() and not (output / "encoding.json").exists()
    assert encode(tiny_model, images, output, "--latent_std") == 0
    assert hashes(output) == hashes(encoded), "and nothing of the lock stays"
