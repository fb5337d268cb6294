"""Small data sets of known content, as make_shards.py and encode_shards.py write them."""

import io
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import safetensors.torch
import simplejpeg
import torch
from PIL import Image

from data_prep.shard_format.shards import (
    EMPTY_PROMPT,
    INDEX,
    Bucket,
    Manifest,
    Shard,
    TarShardWriter,
    json_bytes,
    sample_key,
    write_index,
    write_manifest,
)
from train.data.batch import Batch
from train.data.shard_dataset import ShardDataset

MEMBERS = ("payload", "json", "txt")
SIZES = [(32, 16), (16, 32)]  # width, height of the buckets


def pixels_of(number: int) -> np.ndarray:
    width, height = SIZES[number % 2]
    return np.random.default_rng(number).integers(0, 256, (height, width, 3), dtype=np.uint8)


def latent_of(number: int) -> torch.Tensor:
    width, height = SIZES[number % 2]
    return torch.full((16, height // 8, width // 8), float(number), dtype=torch.bfloat16)


def embeds_of(number: int) -> torch.Tensor:
    return torch.full((5 + number % 4, 8), float(number + 1), dtype=torch.bfloat16)


def payload_of(number: int, payload: str) -> bytes:
    if payload == "safetensors":
        return safetensors.torch.save({"latent": latent_of(number), "prompt_embeds": embeds_of(number)})
    if payload == "jpg":
        return simplejpeg.encode_jpeg(pixels_of(number), quality=95, colorsubsampling="444")
    file = io.BytesIO()
    Image.fromarray(pixels_of(number)).save(file, "PNG")
    return file.getvalue()


def caption_of(number: int) -> str:
    return f"caption {number} é"


def write_set(
    folder: Path,
    samples: int = 12,
    payload: str = "safetensors",
    shard_size: int = 5,
    caption: Callable[[int], str] = caption_of,
) -> Path:
    """A complete data set; sample `number` has `caption(number)`, and lies in bucket number % 2."""
    folder.mkdir(parents=True)
    rows: dict[str, list] = {name: [] for name in ("key", "path", "shard", "bucket", "caption_length", "prompt_tokens")}
    places = {f"{m}_{f}": [] for m in MEMBERS for f in ("offset", "size")}
    shards = []
    for shard, first in enumerate(range(0, samples, shard_size)):
        numbers = range(first, min(first + shard_size, samples))
        with TarShardWriter(folder / f"{shard:06d}.tar") as tar:
            for number in numbers:
                key, text = sample_key(shard, number - first), caption(number)
                facts = json_bytes({"key": key, "path": f"photos/{number}.jpg"})
                members = [(payload, payload_of(number, payload)), ("json", facts), ("txt", text.encode())]
                for (suffix, place), name in zip(
                    tar.add(key, members).items(), ("payload", "json", "txt"), strict=True
                ):
                    assert suffix in (name, payload)
                    places[f"{name}_offset"].append(place[0])
                    places[f"{name}_size"].append(place[1])
                row = (key, f"photos/{number}.jpg", shard, number % 2, len(text), 0)
                for column, value in zip(rows, row, strict=True):
                    rows[column].append(value)
        shards.append(Shard(f"{shard:06d}.tar", len(numbers), tar.bytes, tar.sha256))
    write_index(folder, rows | places)
    counts = [(samples + 1) // 2, samples // 2]
    buckets = [Bucket(i, *size, counts[i]) for i, size in enumerate(SIZES)]
    write_manifest(folder, Manifest(payload, "f" * 64, {}, buckets, {"samples": samples}, shards, {}))
    if payload == "safetensors":
        safetensors.torch.save_file(
            {"prompt_embeds": torch.full((5, 8), -1.0, dtype=torch.bfloat16)}, folder / EMPTY_PROMPT
        )
    return folder


def assert_equal(a: Batch, b: Batch) -> None:
    for name, value in vars(a).items():
        other = getattr(b, name)
        if isinstance(value, torch.Tensor):
            assert torch.equal(value, other), name
        else:
            assert value == other, name


def break_sample(folder: Path, number: int) -> None:
    index = ShardDataset(folder).index
    with open(folder / f"{index.shard[number]:06d}.tar", "r+b") as file:
        file.seek(int(index.payload_offset[number]))
        file.write(b"\xff" * 16)


def give_weights(folder: Path, weights: list[float]) -> Path:
    """Write a column of weights into the index of a set."""
    table = pq.read_table(folder / INDEX)
    column = pa.array(weights, pa.float64())
    place = table.schema.get_field_index("weight")
    pq.write_table(
        table.set_column(place, "weight", column) if place >= 0 else table.append_column("weight", column),
        folder / INDEX,
    )
    return folder
