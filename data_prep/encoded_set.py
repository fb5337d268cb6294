"""An encoded data set while it is written: shards with commit marks, then index and manifest."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow.parquet as pq

from data_prep.encoding import IDENTITY
from data_prep.files import json_bytes, remove_abandoned, write_file
from data_prep.shards import (
    EMPTY_PROMPT,
    INDEX_ROWS,
    SIZES,
    Manifest,
    Shard,
    ShardIndex,
    ShardReader,
    TarShardWriter,
    rows_name,
    stats_name,
    tar_name,
    write_index,
    write_manifest,
    write_rows,
)

if TYPE_CHECKING:
    import torch

ENCODING = "encoding.json"  # written first: what every shard of this folder must agree with


class EncodedSet:
    """The output folder of encode_shards.py for one image set and one pair of encoders.

    Shards keep the numbers of the image shards. NNNNNN.parquet holds the rows of the future index; NNNNNN_stats.json is
    written last and marks the shard as done. The encoded index has the image index's row order, so that a sample's
    random draws in training are the same for both.
    """

    def __init__(
        self, folder: Path, images: Manifest, index: ShardIndex, encoding: dict[str, Any], source: Path
    ) -> None:
        self.folder, self.images, self.index, self.encoding = folder, images, index, encoding
        self._reader = ShardReader(source, images)
        identity = {name: encoding[name] for name in (*IDENTITY, "latent_std")}
        self.fingerprint = hashlib.sha256(json_bytes({"images": images.fingerprint, **identity})).hexdigest()

    def prepare(self, empty_prompt: Callable[[], bytes]) -> None:
        """Make the folder, or check that what lies there is a part of this set. Raises ValueError with the difference."""
        self.folder.mkdir(parents=True, exist_ok=True)
        remove_abandoned(self.folder)
        described = self.folder / ENCODING
        if described.is_file():
            there = json.loads(described.read_text())
            if there["fingerprint"] != self.fingerprint:
                raise ValueError(
                    f"{self.folder} holds shards of another set: {self._difference(there)}; choose another folder"
                )
        else:
            if any(self.folder.glob("*.tar")):
                raise ValueError(
                    f"{self.folder} holds shards that encode_shards.py did not write; choose another folder"
                )
            write_file(described, json_bytes(self._identity()))
        if not (self.folder / EMPTY_PROMPT).is_file():
            write_file(self.folder / EMPTY_PROMPT, empty_prompt())

    def _identity(self) -> dict[str, Any]:
        return {"fingerprint": self.fingerprint, "images": self.images.fingerprint, **self.encoding}

    def _difference(self, there: dict[str, Any]) -> str:
        here = self._identity()
        names = [name for name in ("images", *IDENTITY, "latent_std") if there.get(name) != here[name]]
        return ", ".join(f"{name} {there.get(name)} there, {here[name]} here" for name in names)

    def is_done(self, shard: int) -> bool:
        return self._stats_path(shard).is_file()

    def _number(self, shard: int) -> int:
        return int(self.images.shards[shard].name.partition(".")[0])

    def _stats_path(self, shard: int) -> Path:
        return self.folder / stats_name(self._number(shard))

    def write_shard(self, shard: int, rows: np.ndarray, samples: Iterator[tuple[int, dict[str, torch.Tensor]]]) -> None:
        """Write one shard from (row of the image index, tensors); commits it."""
        import safetensors.torch

        number, images = self._number(shard), self.index
        columns: dict[str, dict[int, Any]] = {name: {} for name in INDEX_ROWS.names}
        with TarShardWriter(self.folder / tar_name(number)) as tar:
            for row, tensors in samples:
                text, record = (
                    self._reader.read(shard, int(offset[row]), int(size[row]))
                    for offset, size in ((images.txt_offset, images.txt_size), (images.json_offset, images.json_size))
                )
                payload = safetensors.torch.save(tensors)
                places = tar.add(str(images.key[row]), (("safetensors", payload), ("json", record), ("txt", text)))
                for member, suffix in (("payload", "safetensors"), ("json", "json"), ("txt", "txt")):
                    columns[f"{member}_offset"][row], columns[f"{member}_size"][row] = places[suffix]
                for name in ("key", "path", "shard", "bucket", "caption_length"):
                    columns[name][row] = getattr(images, name)[row]
                columns["prompt_tokens"][row] = len(tensors["prompt_embeds"])
        table = {name: [values[int(row)] for row in rows] for name, values in columns.items()}
        write_rows(self.folder / rows_name(number), table, INDEX_ROWS)
        stats = {"fingerprint": self.fingerprint, "samples": len(rows), "bytes": tar.bytes, "sha256": tar.sha256}
        write_file(self._stats_path(shard), json_bytes(stats))

    def finish_if_complete(self) -> bool:
        """Write index, sizes and manifest when every shard is there. Ranks that end together write the same bytes."""
        if not all(self.is_done(shard) for shard in range(len(self.images.shards))):
            return False
        tables, shards = [], []
        for position in range(len(self.images.shards)):
            number = self._number(position)
            tables.append(pq.read_table(self.folder / rows_name(number)))
            stats = json.loads(self._stats_path(position).read_bytes())
            shards.append(Shard(tar_name(number), stats["samples"], stats["bytes"], stats["sha256"]))
        write_index(self.folder, {name: [v for t in tables for v in t[name].to_pylist()] for name in INDEX_ROWS.names})
        write_file(self.folder / SIZES, json_bytes({shard.name: shard.samples for shard in shards}))
        manifest = Manifest(
            payload="safetensors",
            fingerprint=self.fingerprint,
            options={"images": self.images.fingerprint, "latent_std": self.encoding["latent_std"]},
            buckets=self.images.buckets,
            totals={"samples": len(self.index), "bytes": sum(shard.bytes for shard in shards)},
            shards=shards,
            versions=_versions(),
            encoding=self.encoding,
        )
        write_manifest(self.folder, manifest)
        return True


def _versions() -> dict[str, str]:
    from importlib.metadata import version

    return {name: version(name) for name in ("torch", "diffusers", "transformers", "safetensors")}
