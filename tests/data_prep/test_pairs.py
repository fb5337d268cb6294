"""Pairs of an edit, from every way of naming them to encoded shards: sizes, members, what is missing, the report."""

import csv
import json

import numpy as np
import pytest
import torch
from PIL import Image

from data_prep import check_shards, encode_shards, make_shards
from data_prep.images.buckets import BucketOptions, place
from data_prep.images.stored_pixels import decode_stored
from data_prep.shard_format.shards import ShardReader, members_of, read_index, read_manifest, rows_name
from qwen_image.model.family import SOURCE_AREA, source_size
from tests.helpers.edit_reference import picture

AREA = ["--max_pixels", "9216", "--source_pixels", "9216", "--num_workers", "0"]


def pack(folder, output, *more):
    return make_shards.main(["--dataset_base_path", str(folder), "--output_path", str(output), *AREA, *more])


def write_pictures(folder, names, size=(300, 200)):
    folder.mkdir(parents=True, exist_ok=True)
    for number, name in enumerate(names):
        picture(*size, number).save(folder / name)


def metadata(folder, kind):
    """One image with two sources, named as programs do."""
    write_pictures(folder, ["t.png", "a.png", "b.png"])
    rows = {
        "ours.csv": {"image": "t.png", "prompt": "p", "source_image": "a.png", "source_image_2": "b.png"},
        "diffsynth.json": {"image": "t.png", "prompt": "p", "edit_image": ["a.png", "b.png"]},
        "musubi.jsonl": {"image_path": "t.png", "caption": "p", "control_path_0": "a.png", "control_path_1": "b.png"},
        "named.csv": {"image": "t.png", "prompt": "p", "before": "a.png", "mask": "b.png"},
    }[kind]
    path = folder / ("metadata" + kind[kind.index(".") :])
    if path.suffix == ".csv":
        with open(path, "w", newline="") as file:
            writer = csv.DictWriter(file, rows)
            writer.writeheader()
            writer.writerow(rows)
    else:
        path.write_text(json.dumps([rows] if path.suffix == ".json" else rows))
    return ["--source_columns", "before,mask"] if kind == "named.csv" else []


def folders(folder):
    for name in ("target/sub", "source/sub", "source_2/sub"):
        write_pictures(folder / name, ["t.png"])
    (folder / "target" / "sub" / "t.txt").write_text("p")


@pytest.mark.parametrize("kind", ["ours.csv", "diffsynth.json", "musubi.jsonl", "named.csv", "folders"])
def test_every_way_of_naming_pairs(tmp_path, kind):
    base = tmp_path / "in"
    flags = metadata(base, kind) if kind != "folders" else folders(base) or []
    assert pack(base, tmp_path / "out", *flags) == 0
    manifest, index = read_manifest(tmp_path / "out"), read_index(tmp_path / "out")
    size = source_size(9216, 300, 200)
    assert [(b.width, b.height, b.sources) for b in manifest.buckets] == [(*size, (size, size))]
    assert manifest.totals["pairs"] == 1 and len(index) == 1
    run = ShardReader(tmp_path / "out").read(0, int(index.sources_offset[0]), int(index.sources_size[0]))
    assert [decode_stored(image, *size).shape for image in members_of(run)] == [(size[1], size[0], 3)] * 2
    assert check_shards.main([str(tmp_path / "out"), "--num_workers", "0"]) == 0
    assert pack(base, tmp_path / "plain", "--source_columns", "none") == 0
    assert not any(bucket.sources for bucket in read_manifest(tmp_path / "plain").buckets)


def test_images_without_sources_are_packed_as_before(tmp_path):
    """No field of a text-to-image set tells of pairs."""
    write_pictures(tmp_path / "in", ["a.png"])
    (tmp_path / "in" / "a.txt").write_text("p")
    assert pack(tmp_path / "in", tmp_path / "out", "--source_pixels", str(SOURCE_AREA)) == 0
    manifest = json.loads((tmp_path / "out" / "manifest.json").read_text())
    assert "sources" not in manifest["buckets"][0] and "source_pixels" not in manifest["options"]
    assert "stretch" not in manifest["options"] and "pairs" not in manifest["totals"]
    import pyarrow.parquet as pq

    for name in ("index.parquet", rows_name(0)):
        assert not any(
            "source" in column or "picture" in column for column in pq.read_schema(tmp_path / "out" / name).names
        )


def test_what_is_missing_or_broken_fails_by_name(tmp_path, capsys):
    base = tmp_path / "in"
    write_pictures(base, ["t.png", "a.png"])
    (base / "bad.png").write_bytes(b"not an image")
    rows = ["a.png", "none.png", "", "bad.png", "../out.png"]
    lines = [f't.png,"p",{source}' for source in rows]
    (base / "metadata.csv").write_text("\n".join(["image,prompt,source_image", *lines]))
    assert pack(base, tmp_path / "out", "--max_failed_ratio", "1") == 0
    import pyarrow.parquet as pq

    table = pq.read_table(tmp_path / "out" / rows_name(0)).to_pylist()
    assert [row["status"] for row in table] == ["ok", *["failed"] * 4]
    assert [row["reason"] for row in table[1:]] == [
        *["source image missing"] * 2,
        "source image not usable",
        "source image missing",
    ]
    for row, what in zip(table[1:], ("none.png", "holds ''", "bad.png: not an image", "lies outside"), strict=True):
        assert what in row["detail"], row["detail"]
    assert "source image missing" in capsys.readouterr().out


def test_folders_lack_a_partner(tmp_path, capsys):
    base = tmp_path / "in"
    write_pictures(base / "target", ["a.png", "b.png", "c.png"])
    write_pictures(base / "source", ["a.png", "c.png", "lonely.png"])
    picture(30, 30).save(base / "source" / "c.jpg")
    for name in "abc":
        (base / "target" / f"{name}.txt").write_text("p")
    assert pack(base, tmp_path / "out", "--max_failed_ratio", "1") == 0
    said = capsys.readouterr().out
    assert "source/b.* is missing" in said and "1 images in source/ folders belong to no image in target/" in said
    assert read_manifest(tmp_path / "out").totals["samples"] == 1


@pytest.mark.parametrize("width,height", [(300, 200), (640, 480), (1000, 1013), (77, 200), (4000, 3000)])
def test_pairs_go_to_inferences_own_size_whole(width, height):
    """Target and source of one size through the same stretch, nothing cropped: no pixel is shifted."""
    options = BucketOptions(stretch=True, max_upscale=10**6)
    found = place(width, height, options)
    assert (found.width, found.height) == source_size(SOURCE_AREA, width, height)
    assert (found.crop_left, found.crop_top, found.crop_width, found.crop_height) == (0, 0, width, height)


def test_a_packed_identity_pair_has_equal_pixels(tmp_path):
    base = tmp_path / "in"
    write_pictures(base, ["t.png"], (250, 190))
    (base / "metadata.csv").write_text('image,prompt,source_image\nt.png,"p",t.png')
    assert pack(base, tmp_path / "out", "--image_format", "png") == 0
    manifest, index, reader = (
        read_manifest(tmp_path / "out"),
        read_index(tmp_path / "out"),
        ShardReader(tmp_path / "out"),
    )
    bucket = manifest.buckets[0]
    target = decode_stored(
        reader.read(0, int(index.payload_offset[0]), int(index.payload_size[0])), bucket.width, bucket.height
    )
    (run,) = members_of(reader.read(0, int(index.sources_offset[0]), int(index.sources_size[0])))
    assert np.array_equal(target, decode_stored(run, *bucket.sources[0]))
    expected = np.asarray(picture(250, 190).resize((bucket.width, bucket.height), Image.Resampling.LANCZOS)).astype(int)
    assert np.abs(expected - target).max() <= 2, "as diffusers' image processor resizes it, to rounding"


def test_an_interrupted_set_goes_on_and_an_edited_source_is_refused(tmp_path, capsys):
    base, out = tmp_path / "in", tmp_path / "out"
    metadata(base, "ours.csv")
    assert pack(base, out) == 0
    before = (out / "000000.tar").read_bytes()
    (out / "000000_stats.json").unlink()
    assert pack(base, out) == 0 and (out / "000000.tar").read_bytes() == before
    data = bytearray((base / "b.png").read_bytes())
    data[-20] ^= 1  # within the last chunk: the size stays
    (base / "b.png").write_bytes(data)
    assert pack(base, out) == 2
    assert "were edited after they had been packed" in capsys.readouterr().err


@pytest.fixture(scope="module")
def packed(tmp_path_factory):
    base = tmp_path_factory.mktemp("pairs")
    metadata(base / "in", "ours.csv")
    assert pack(base / "in", base / "out") == 0
    return base / "out"


def encode(model, images, output, *more):
    return encode_shards.main(["--model", str(model), "--data", str(images), "--output_path", str(output), *more])


def test_encoded_pairs_hold_what_the_encoders_make(packed, tiny_edit_models, tmp_path):
    from qwen_image.encoders.source_images import SourceImage
    from qwen_image.pipeline import QwenImagePipeline, encode_sources
    from train.data.sample import read_encoded
    from train.data.shard_dataset import ShardDataset

    model = tiny_edit_models["edit-2509"]
    assert encode(model, packed, tmp_path / "enc", "--empty_captions") == 0
    manifest, index = read_manifest(tmp_path / "enc"), read_index(tmp_path / "enc")
    assert manifest.encoding["family"] == "Qwen-Image-Edit-2509" and manifest.encoding["template_drop"] == 64
    assert not (tmp_path / "enc" / "empty_prompt.safetensors").exists()
    payload = ShardReader(tmp_path / "enc").read(0, int(index.payload_offset[0]), int(index.payload_size[0]))
    found = read_encoded(payload, 64)
    sample = ShardDataset(packed).read(0)
    sources = [SourceImage(pixels.permute(1, 2, 0).numpy(), 300, 200) for pixels in sample.sources]
    pipeline = QwenImagePipeline.from_pretrained(str(model), components=("text_encoder", "vae"), dtype=torch.float32)
    prompt = pipeline.text_encoder.encode_pictures("p", sources)
    assert torch.equal(found.prompt_embeds, prompt.embeds.bfloat16())
    assert found.picture_tokens == prompt.picture_tokens == index.picture_tokens[0]
    assert torch.equal(found.empty_prompt, pipeline.text_encoder.encode_pictures("", sources).embeds.bfloat16())
    latents = encode_sources(pipeline.vae, [sources])
    assert all(torch.equal(a, b[0, :, 0].bfloat16()) for a, b in zip(found.sources, latents, strict=True))
    assert check_shards.main([str(tmp_path / "enc"), "--num_workers", "0"]) == 0
    assert len(found.cut(1).prompt_embeds) == found.picture_tokens + 1, "the limit is the instruction's"


def test_variants_of_an_instruction_have_the_pictures_too(packed, tiny_edit_models, tmp_path):
    from functools import partial

    from data_prep.encoding.caption_variants import CaptionOptions, caption_chance
    from qwen_image.encoders.source_images import SourceImage
    from qwen_image.pipeline import QwenImagePipeline
    from train.data.shard_dataset import ShardDataset

    model, levers = tiny_edit_models["edit-2509"], ["--caption_suffix", "{in oil|in chalk}", "--caption_alternatives"]
    assert encode(model, packed, tmp_path / "enc", "--caption_variants", "4", *levers) == 0
    assert check_shards.main([str(tmp_path / "enc"), "--num_workers", "0"]) == 0
    dataset, sample = ShardDataset(tmp_path / "enc"), ShardDataset(packed).read(0)
    sources = [SourceImage(pixels.permute(1, 2, 0).numpy(), 300, 200) for pixels in sample.sources]
    pipeline = QwenImagePipeline.from_pretrained(str(model), components=("text_encoder",), dtype=torch.float32)
    drawn = [dataset.read(0, partial(caption_chance, 0, epoch, 0)) for epoch in range(30)]
    options = CaptionOptions(caption_suffix="{in oil|in chalk}", caption_alternatives=True)
    texts = options.variants(["p"], 4, 0, str(read_index(packed).path[0]))
    assert {each.caption for each in drawn} == set(texts) == {"p in oil", "p in chalk"}
    for each in drawn:
        assert torch.equal(
            each.prompt_embeds, pipeline.text_encoder.encode_pictures(each.caption, sources).embeds.bfloat16()
        )
    cut = ShardDataset(tmp_path / "enc", max_prompt_tokens=1)
    lengths = {len(cut.read(0, partial(caption_chance, 0, epoch, 0)).prompt_embeds) for epoch in range(9)}
    assert lengths == {int(dataset.index.picture_tokens[0]) + 1}


def test_models_and_images_that_do_not_go_together_are_refused(packed, tiny_model, tiny_edit_models, tmp_path, capsys):
    assert encode(tiny_model, packed, tmp_path / "a") == 2
    assert "has 2 source images, but Qwen-Image paints from text alone" in capsys.readouterr().err
    assert encode(tiny_edit_models["edit"], packed, tmp_path / "b") == 2
    assert "has 2 source images, but Qwen-Image-Edit takes one source image" in capsys.readouterr().err


def test_the_report_shows_pairs(packed, tmp_path):
    report = tmp_path / "report.html"
    assert check_shards.main([str(packed), "--num_workers", "0", "--report", str(report)]) == 0
    size = "×".join(map(str, source_size(9216, 300, 200)))
    assert f"{size} ← {size} ← {size}" in report.read_text() or f"{size} ← {size} + {size}" in report.read_text()
