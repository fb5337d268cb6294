"""encode_shards.py --caption_variants: what is stored of each sample's captions, checked, and drawn in training."""

import hashlib
import itertools
import json
import shutil
import tarfile
from collections import Counter
from functools import partial
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image
from safetensors.torch import load

from data_prep import check_shards, encode_shards, make_shards
from data_prep.encoding.caption_variants import CaptionOptions, caption_chance
from data_prep.encoding.encoders import Encoders
from data_prep.shard_format.shards import ShardReader, read_index, read_manifest, variants_of
from qwen_image.pipeline import QwenImagePipeline
from train.data.sample import BrokenSample
from train.data.shard_dataset import ShardDataset
from train.flow.timestep_sampling import SigmaSampling
from train.loader.batch_shapes import BatchOptions, batch_shapes, largest_batch
from train.loader.indexed_loader import BatchLoader
from train.loader.webdataset_stream import StreamedSet, StreamLoader
from train.loader.worker_loader import Reading

LEVERS = ["--caption_shuffle_tags", "--caption_keep_tags", "1", "--trigger_word", "zwx"]
OPTIONS = CaptionOptions(caption_shuffle_tags=True, caption_keep_tags=1, trigger_word="zwx")
K = 5


def captions_of(number: int) -> list[str]:
    """One word alone; tags; or two captions, the second of them longer."""
    tags = [f"cat {number}, red, on a sofa, indoors"]
    return [["cat"], tags, [*tags, f"a much longer description of cat {number} on its sofa"]][number % 3]


@pytest.fixture(scope="module")
def images(tmp_path_factory) -> Path:
    """9 samples in 3 shards and 2 buckets."""
    folder, rng = tmp_path_factory.mktemp("photos"), np.random.default_rng(1)
    for number in range(9):
        size = (96, 64) if number % 2 else (64, 96)
        Image.fromarray(rng.integers(0, 256, (*size[::-1], 3), dtype=np.uint8)).save(folder / f"{number}.png")
        (folder / f"{number}.txt").write_text("\n".join(captions_of(number)))
    shards = tmp_path_factory.mktemp("data") / "shards"
    flags = [
        "--dataset_base_path",
        str(folder),
        "--output_path",
        str(shards),
        "--max_pixels",
        "6144",
        "--caption_lines",
    ]
    assert make_shards.main([*flags, "--num_workers", "0", "--samples_per_shard", "3"]) == 0
    return shards


def encode(model: Path, images: Path, output: Path, *more: str) -> int:
    flags = ["--model", str(model), "--data", str(images), "--output_path", str(output), "--dtype", "float32"]
    return encode_shards.main([*flags, "--num_workers", "1", *more])


@pytest.fixture(scope="module")
def encoded(images, tiny_model, tmp_path_factory) -> Path:
    output = tmp_path_factory.mktemp("data") / "encoded"
    assert encode(tiny_model, images, output, "--caption_variants", str(K), *LEVERS) == 0
    return output


def hashes(folder: Path) -> dict[str, str]:
    return {
        path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in sorted(folder.iterdir()) if path.is_file()
    }


def texts_of(number: int) -> list[str]:
    return OPTIONS.variants(captions_of(number), K, 0, f"{number}.png")


# ── what is stored ───────────────────────────────────────────────────────────────────────────────────────────────────


def test_each_text_is_stored_once_with_the_embedding_that_encoding_online_gives_it(encoded, tiny_model):
    index, reader = read_index(encoded), ShardReader(encoded)
    text_encoder = QwenImagePipeline.from_pretrained(
        str(tiny_model), components=("text_encoder",), dtype=torch.float32
    ).text_encoder
    assert index.variant_tokens.shape == (9, K)
    for row in range(9):
        number, shard = int(index.path[row][0]), int(index.shard[row])
        texts = texts_of(number)
        record = reader.read(shard, int(index.json_offset[row]), int(index.json_size[row]))
        txt = reader.read(shard, int(index.txt_offset[row]), int(index.txt_size[row])).decode()
        assert txt == json.loads(record)["caption"] == texts[0] == OPTIONS.first(captions_of(number))
        assert "captions" not in json.loads(record)
        variants = variants_of(record)
        if number % 3 == 0:
            assert texts == ["zwx, cat"] * K and variants == []
        else:
            assert [v.caption for v in variants] == list(dict.fromkeys(texts))
            assert [next(v.caption for v in variants if draw in v.draws) for draw in range(K)] == texts
        dataset = ShardDataset(encoded)
        seen = {}
        for epoch in range(40):
            sample = dataset.read(row, partial(caption_chance, 0, epoch, 0))
            seen[sample.caption] = sample.prompt_embeds
        assert set(seen) == set(texts)
        for text, embeds in seen.items():
            online = text_encoder.encode_list([text])[0].to(torch.bfloat16)
            torch.testing.assert_close(embeds, online, rtol=2**-7, atol=1e-3)  # in a batch the last bit may differ
        tokens = [len(seen[text]) for text in texts]
        assert index.variant_tokens[row].tolist() == tokens and index.prompt_tokens[row] == max(tokens)


def test_the_manifest_tells_and_another_form_is_another_set(images, encoded, tiny_model, tmp_path, capsys):
    told = {"trigger_word": "zwx", "caption_shuffle_tags": True, "caption_keep_tags": 1, "variants": K, "seed": 0}
    assert read_manifest(encoded).encoding["captions"] == told
    assert encode(tiny_model, images, encoded, "--caption_variants", str(K), *LEVERS, "--caption_seed", "1") == 2
    assert "captions {" in capsys.readouterr().err
    assert encode(tiny_model, images, encoded) == 2
    assert "captions {'caption_keep_tags': 1, 'caption_shuffle_tags': True, 'seed': 0" in capsys.readouterr().err


def test_ranks_and_restarts_write_the_same_bytes(images, encoded, tiny_model, tmp_path, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    for rank in ("1", "0"):
        monkeypatch.setenv("RANK", rank)
        assert encode(tiny_model, images, tmp_path / "two", "--caption_variants", str(K), *LEVERS) == 0
    assert hashes(tmp_path / "two") == hashes(encoded)


def test_check_and_report(encoded, tmp_path, capsys):
    assert check_shards.main([str(encoded), "--num_workers", "0", "--report", str(tmp_path / "r.html")]) == 0
    assert "everything agrees" in capsys.readouterr().out
    assert check_shards.main([str(encoded), "--num_workers", "0", "--quick"]) == 0


@pytest.mark.parametrize(
    ("old", "new", "said"),
    [
        (b'"draws":[0]', b'"draws":[9]', "variants in its json are damaged"),
        (b"variant_2.safetensors", b"variant_9.safetensors", "variants are variant_9.safetensors"),
        (b'{"prompt_embeds"', b'{"prompt_embedz"', "cannot be decoded"),
    ],
)
def test_damaged_variants_are_found(encoded, tmp_path, capsys, old, new, said):
    folder = shutil.copytree(encoded, tmp_path / "damaged")
    tar, manifest = folder / "000000.tar", json.loads((folder / "manifest.json").read_text())
    content = tar.read_bytes()
    place = content.rindex(old) if b"embeds" in old else content.index(old)
    content = content[:place] + new + content[place + len(old) :]
    if b"variant" in old:  # the header's checksum, too
        header = bytearray(content[place - 13 : place - 13 + 512])
        header[148:156] = b" " * 8
        header[148:156] = b"%06o\0 " % sum(header)
        content = content[: place - 13] + bytes(header) + content[place - 13 + 512 :]
    tar.write_bytes(content)
    manifest["shards"][0]["sha256"] = hashlib.sha256(content).hexdigest()
    (folder / "manifest.json").write_text(json.dumps(manifest))
    assert check_shards.main([str(folder), "--num_workers", "0"]) == 1
    assert said in capsys.readouterr().err


def test_an_index_whose_variants_are_of_another_type_is_damaged(encoded, tmp_path):
    table = pq.read_table(encoded / "index.parquet")
    place = table.schema.get_field_index("variant_tokens")
    lists = table["variant_tokens"].to_pylist()
    for column in (
        pa.array(lists, pa.list_(pa.int32())),
        pa.array(["x"] * 9),
        pa.array([None, *lists[1:]], pa.list_(pa.int32(), K)),
        pa.array([[None] * K, *lists[1:]], pa.list_(pa.int32(), K)),
    ):
        pq.write_table(table.set_column(place, "variant_tokens", column), tmp_path / "index.parquet")
        with pytest.raises(ValueError, match="is damaged"):
            read_index(tmp_path)


def test_without_chance_there_is_one_variant_for_each_caption_and_none_where_no_sample_has_two(
    images, tiny_model, tmp_path, capsys, monkeypatch
):
    encoded_texts: list[str] = []
    original = Encoders.encode_captions

    def noted(self, captions, batch_size):
        encoded_texts.extend(set(captions) - self._cache.keys())
        return original(self, captions, batch_size)

    monkeypatch.setattr(Encoders, "encode_captions", noted)
    assert encode(tiny_model, images, tmp_path / "all", "--caption_variants", "8") == 0
    said = capsys.readouterr().out
    assert "captions: 2 variants of each sample's, as they stand" in said
    assert "--caption_variants 8: no sample has more than 2 different ones" in said
    assert Counter(encoded_texts) == Counter({"", *itertools.chain(*map(captions_of, range(9)))}), "each text once"
    index = read_index(tmp_path / "all")
    one = [int(path[0]) % 3 != 2 for path in index.path]
    assert (index.variant_tokens[one, 1] == 0).all() and (index.variant_tokens[np.logical_not(one), 1] > 0).all()
    assert check_shards.main([str(tmp_path / "all"), "--num_workers", "0"]) == 0
    capsys.readouterr()
    assert encode(tiny_model, images, tmp_path / "first") == 0
    said = capsys.readouterr().out
    assert (
        "3 samples have several captions, up to 2, of which 1 at most is encoded: --caption_variants 2 holds all"
        in said
    )
    assert check_shards.main([str(tmp_path / "first"), "--num_workers", "0"]) == 0
    assert {ShardDataset(tmp_path / "first").read(2, partial(caption_chance, 0, e, 2)).caption for e in range(9)} == {
        captions_of(2)[0]
    }
    names = pq.read_schema(tmp_path / "first" / "index.parquet").names
    assert not {"variant_tokens", "captions", "longest_caption"} & set(names)


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["--caption_shuffle_tags"], "--caption_shuffle_tags would change nothing with --caption_variants 1"),
        (["--caption_variants", "0"], "--caption_variants 0: must be from 1 to 1000"),
        (["--caption_variants", "4", "--caption_keep_tags", "1"], "caption_keep_tags 1 changes nothing without"),
        (["--caption_tag_dropout", "2"], "caption_tag_dropout must be from 0 to 1"),
    ],
)
def test_flags_that_cannot_be_meant_are_one_line_before_anything_is_written(
    images, tiny_model, tmp_path, capsys, flags, said
):
    assert encode(tiny_model, images, tmp_path / "x", *flags) == 2
    assert said in capsys.readouterr().err and not (tmp_path / "x").exists()


# ── training draws ───────────────────────────────────────────────────────────────────────────────────────────────────


def taken(folder: Path, count: int, **options) -> dict[tuple[int, int], str]:
    dataset = ShardDataset(folder)
    with BatchLoader(dataset, dataset.order(1, seed=3), SigmaSampling(), Reading(**options)) as loader:
        batches = list(itertools.islice(loader, count))
    return {(b.epoch, i): text for b in batches for i, text in zip(b.indices, b.captions, strict=True)}


def test_each_epoch_draws_one_evenly_on_any_number_of_ranks(encoded):
    everything = taken(encoded, 9 * 30)
    for options in ({"world": 2, "rank": 1}, {"world": 3, "rank": 0, "accumulation": 2}, {"num_workers": 1}):
        assert taken(encoded, 20, **options).items() <= everything.items()
    index = read_index(encoded)
    for row in range(9):
        counts = Counter(text for (_, i), text in everything.items() if i == row)
        assert set(counts) <= set(texts_of(int(index.path[row][0])))
    assert len(set(everything.values())) > 15


def test_without_chance_the_first_and_all_lengths_count_for_shapes(encoded):
    dataset = ShardDataset(encoded)
    assert [dataset.read(row).caption for row in range(9)] == [
        texts_of(int(path[0]))[0] for path in read_index(encoded).path
    ]
    lengths = {
        (int(b), int(t))
        for b, tokens in zip(dataset.index.bucket, dataset.index.variant_tokens, strict=True)
        for t in tokens
    }
    assert batch_shapes(BatchOptions(), dataset, 1).shapes == len(lengths)
    largest = largest_batch(BatchOptions(), dataset, 1)
    assert largest.text == dataset.index.variant_tokens.max() == dataset.index.prompt_tokens.max()
    cut = ShardDataset(encoded, max_prompt_tokens=4)
    assert all(len(cut.read(1, partial(caption_chance, 0, e, 1)).prompt_embeds) == 4 for e in range(8))


def test_a_damaged_variant_is_a_broken_sample(encoded, tmp_path):
    folder = shutil.copytree(encoded, tmp_path / "damaged")
    tar = folder / "000000.tar"
    content = tar.read_bytes()
    place = content.rindex(b'{"prompt_embeds"')
    tar.write_bytes(content[:place] + b"\xff" * 16 + content[place + 16 :])
    dataset, broken = ShardDataset(folder), set()
    for row, epoch in itertools.product(range(3), range(60)):
        try:
            dataset.read(row, partial(caption_chance, 0, epoch, row))
        except BrokenSample as error:
            broken.add((row, str(error)))
    assert len(broken) == 1
    (row, said) = broken.pop()
    assert f"{row:012d} in" in said
    assert dataset.read(row).caption == texts_of(row)[0], "the first is whole"


def test_a_stream_draws_too(encoded):
    dataset = StreamedSet(str(encoded), print, Path("unused"))
    more = {"seed": 1, "buffer": 3, "empty_prompt": dataset.empty_prompt, "variants": True}
    with StreamLoader(dataset.urls, 1, SigmaSampling(), **more) as loader:
        batches = list(itertools.islice(loader, 150))
    found: dict[str, set[str]] = {}
    by_text = {}
    for batch in batches:
        found.setdefault(batch.keys[0], set()).add(batch.captions[0])
        by_text[batch.captions[0]] = batch.prompt_embeds[0]
    index = ShardDataset(encoded).index
    expected = {text for row in range(9) for text in texts_of(int(read_index(encoded).path[row][0]))}
    assert set(by_text) == expected and len(index) == 9
    reader = ShardDataset(encoded)
    for epoch in range(30):
        sample = reader.read(1, partial(caption_chance, 0, epoch, 1))
        assert torch.equal(by_text[sample.caption], sample.prompt_embeds)


def test_members_of_a_variant_are_whole_safetensors(encoded):
    with tarfile.open(encoded / "000000.tar") as tar:
        names = [member.name for member in tar]
        first = next(name for name in names if "variant_2" in name)
        assert names[names.index(first) - 1] == first.replace("variant_2.safetensors", "txt")
        assert set(load(tar.extractfile(first).read())) == {"prompt_embeds"}
