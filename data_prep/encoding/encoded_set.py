"""An encoded data set while it is written: shards with commit marks, then index and manifest."""

from __future__ import annotations

import hashlib
import json
import re
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from data_prep.encoding.caption_variants import FIRST, Variants
from data_prep.encoding.encoded_samples import texts_of
from data_prep.encoding.encoder_facts import EDIT_IDENTITY, IDENTITY
from data_prep.encoding.encoders import VARIANT
from data_prep.encoding.variant_members import variant_members, with_variants
from data_prep.images.stored_pixels import mask_share
from data_prep.packing.finalize import finalize
from data_prep.packing.pack import read_stats, stats_of
from data_prep.shard_format.shards import (
    EMPTY_PROMPT,
    MANIFEST,
    MASK_ROWS,
    NO_MASK,
    PAIR_ROWS,
    SHARD_ROWS,
    VARIANT_TOKENS,
    WEIGHT_ROWS,
    Manifest,
    ShardIndex,
    ShardReader,
    TarShardWriter,
    bucket_name,
    rows_name,
    sizes_of,
    stats_name,
    tar_name,
    variant_rows,
    with_more,
    write_rows,
)
from data_prep.sources.regular_files import read_regular
from files.atomic_files import json_bytes, remove_abandoned, write_file
from files.shown import shown

if TYPE_CHECKING:
    import torch

ENCODING = "encoding.json"  # written first: what every shard of this folder must agree with
SETTINGS = (*IDENTITY, "latent_std", "computed_in")  # shards that differ in one of these don't go into one set
EDIT_SETTINGS = (*EDIT_IDENTITY, "empty_captions")  # in sets for edit models
CAPTIONS = "captions"  # where they were given another form, or there are several of a sample
DEFAULT_PROMPT_TOKENS = 512  # train_lora.py's --max_prompt_tokens
FAILED = "cannot be read"  # the reason that stands in the statistics; the details stand in NNNNNN.parquet


class EncodedSet:
    """The output folder of encode_shards.py for one image set and one pair of encoders.

    Shards keep the numbers of the image shards, where those have numbers for names, and samples their keys. A shard's
    files are those of make_shards.py: NNNNNN.parquet holds one row a sample, left-out ones with the reason, and
    NNNNNN_stats.json is written last and marks the shard as done. The encoded index has the image index's row order,
    so that (unless samples are left out) a sample's random draws in training are the same for both.
    """

    def __init__(
        self,
        folder: Path,
        images: Manifest,
        index: ShardIndex,
        encoding: dict[str, Any],
        source: Path,
        variants: Variants = FIRST,
    ) -> None:
        self.variants = variants
        self.folder, self.images, self.index, self.encoding = folder, images, index, encoding
        self._reader = ShardReader(source, images)
        names = [shard.name for shard in images.shards]
        ours = all(re.fullmatch(r"\d{6}\.tar", name) for name in names)  # shards made elsewhere are just counted
        self._numbers = [int(name[:6]) for name in names] if ours else list(range(len(names)))
        identity = {name: encoding[name] for name in (*SETTINGS, *EDIT_SETTINGS, CAPTIONS) if name in encoding}
        # Shards of one fingerprint may differ: images may have been edited, and packed again, without changing in size.
        identity["shards"] = [shard.sha256 for shard in images.shards]
        self.fingerprint = hashlib.sha256(json_bytes({"images": images.fingerprint, **identity})).hexdigest()

    def prepare(self, empty_prompt: Callable[[], bytes] | None) -> None:
        """Make the folder, or check that what lies there is a part of this set. Raises ValueError with the difference.

        `empty_prompt`: None for edit models, where the empty caption has another embedding with each picture.
        """
        self.folder.mkdir(parents=True, exist_ok=True)
        remove_abandoned(self.folder)
        described = self.folder / ENCODING
        there = _read(described)
        if there is not None:
            if there["fingerprint"] != self.fingerprint:
                raise ValueError(
                    f"{self.folder} holds shards of another set: {self._difference(there)}; choose another folder"
                )
        else:
            if described.exists() and all(self._ours(path) for path in self.folder.glob("*_stats.json")):
                print(f"{shown(described)} is damaged: written again")
            elif any(self.folder.glob("*.tar")):
                raise ValueError(
                    f"{self.folder} holds shards that encode_shards.py did not write; choose another folder"
                )
            write_file(described, json_bytes(self._identity()))
        if empty_prompt is not None and not (self.folder / EMPTY_PROMPT).is_file():
            write_file(self.folder / EMPTY_PROMPT, empty_prompt())

    def _ours(self, stats: Path) -> bool:
        """Whether a shard's statistics are of this set, or as good as not there."""
        found = stats_of(self.folder, int(stats.name[:6])) if stats.name[:6].isdigit() else None
        return found is None or found["fingerprint"] == self.fingerprint

    def _identity(self) -> dict[str, Any]:
        return {"fingerprint": self.fingerprint, "images": self.images.fingerprint, **self.encoding}

    def _difference(self, there: dict[str, Any]) -> str:
        here = self._identity()
        names = [name for name in ("images", *SETTINGS, *EDIT_SETTINGS, CAPTIONS) if there.get(name) != here.get(name)]
        differences = [f"{name} {there.get(name)} there, {here.get(name)} here" for name in names]
        return ", ".join(differences) or "its image shards had other content"

    def is_done(self, shard: int) -> bool:
        """Whether the shard at this position of the image manifest is committed and its files are whole."""
        return self._stats(shard) is not None

    def _stats(self, shard: int) -> dict[str, Any] | None:
        return read_stats(self.folder, self._numbers[shard], self.fingerprint)

    def is_finished(self) -> bool:
        return (self.folder / MANIFEST).is_file() and not self.missing()

    def missing(self) -> list[int]:
        """Positions of the shards that are not committed yet."""
        return [shard for shard in range(len(self.images.shards)) if not self.is_done(shard)]

    def write_shard(
        self,
        shard: int,
        rows: np.ndarray,
        samples: Iterator[tuple[int, dict[str, torch.Tensor] | ValueError]],
        tokens_of: Callable[[str], int] = lambda caption: 0,
    ) -> int:
        """Write one shard from (row of the image index, its tensors or why it is left out); commits it.

        `tokens_of` a caption that may be longer than what was encoded of it. Returns how many samples were left out.
        """
        number = self._numbers[shard]
        for stale in (self.folder / stats_name(number), self.folder / MANIFEST):
            stale.unlink(missing_ok=True)
        records: dict[int, dict[str, Any]] = {}
        with TarShardWriter(self.folder / tar_name(number)) as tar:
            for row, tensors in samples:
                text, body, record, texts = self._sample(row)
                records[row] = record
                if isinstance(tensors, ValueError):
                    record |= {"status": "failed", "reason": FAILED, "detail": str(tensors)}
                    continue
                self._add(tar, record, tensors, (text, body, texts), tokens_of)
        ordered = [records[int(row)] for row in rows]
        kept = [record for record in ordered if record["status"] == "ok"]
        if not kept:
            tar.path.unlink()
        masked = sum(record["mask_share"] >= 0 for record in kept)
        paired, count = any(record["sources"] for record in ordered), self.variants.count
        weighted = sum(record["weight"] != 1 for record in kept)
        optional = [*[PAIR_ROWS] * paired, *[WEIGHT_ROWS] * bool(weighted), *[MASK_ROWS] * bool(masked)]
        schema = with_more(SHARD_ROWS, *optional, *[variant_rows(count)] * (count > 1))
        columns = {name: [record[name] for record in ordered] for name in schema.names}
        write_rows(self.folder / rows_name(number), columns, schema)
        failed = len(ordered) - len(kept)
        long = [record for record in kept if caption_tokens(record) > DEFAULT_PROMPT_TOKENS]
        cut = [record for record in kept if record["detail"]]
        stats = {
            "fingerprint": self.fingerprint,
            "samples": len(kept),
            "failed": failed,
            "bytes": tar.bytes if kept else 0,
            "sha256": tar.sha256 if kept else "",
            "long_captions": len(long),
            "cut_captions": len(cut),
            **({"masked": masked} if masked else {}),
            "first": {
                name: f"{found[0]['path']} ({found[0]['detail'] or str(caption_tokens(found[0])) + ' tokens'})"
                for name, found in (("long_captions", long), ("cut_captions", cut))
                if found
            },
            "reasons": {f"failed: {FAILED}": failed} if failed else {},
            "buckets": dict(Counter(bucket_of(record) for record in kept)),
            **({"weighted": weighted} if weighted else {}),
        }
        write_file(self.folder / stats_name(number), json_bytes(stats))
        return failed

    def _add(
        self,
        tar: TarShardWriter,
        record: dict[str, Any],
        tensors: dict[str, torch.Tensor],
        told: tuple[bytes, bytes, list[str]],
        tokens_of: Callable[[str], int],
    ) -> None:
        """The members of one sample into the tar, their places and tokens into its record. `told`: what _sample says."""
        import safetensors.torch

        text, body, texts = told
        others = [name for name in tensors if name.startswith(VARIANT)]
        embeds = [tensors["prompt_embeds"], *(tensors.pop(name) for name in others)]
        entries, more = variant_members(texts, embeds)
        if self.variants.identity():
            body = with_variants(body, entries)
        members = (("safetensors", safetensors.torch.save(tensors)), ("json", body), ("txt", text), *more)
        places = list(tar.add(record["key"], members).values())
        for member, (offset, size) in zip(("payload", "json", "txt"), places, strict=False):
            record |= {f"{member}_offset": offset, f"{member}_size": size}
        record["prompt_tokens"] = max(map(len, embeds))
        record["picture_tokens"] = int(tensors.get("picture_tokens", 0))
        if "mask" in tensors:
            record["mask_share"] = mask_share(tensors["mask"].numpy())
        tokens = {entry["caption"]: entry["tokens"] for entry in entries}
        record[VARIANT_TOKENS][: len(texts)] = [tokens[each] for each in texts]
        for each in tokens:
            if (whole := tokens_of(each)) > (kept := tokens[each] - record["picture_tokens"]):
                record["detail"] = f"its caption of {whole} tokens is cut at {kept}"

    def long_captions(self) -> list[str]:
        """What to say of captions that were cut here, and of those that training cuts unless it is told otherwise."""
        counts: Counter[str] = Counter()
        first: dict[str, str] = {}
        for shard in range(len(self.images.shards)):
            stats = self._stats(shard) or {}
            counts.update({name: stats.get(name, 0) for name in ("long_captions", "cut_captions")})
            first = stats.get("first", {}) | first
        said = []
        if counts["cut_captions"]:
            said.append(
                f"warning: {counts['cut_captions']} captions are longer than the text encoder reads and were cut: shorten"
                f" them; first {shown(first['cut_captions'])}; {shown(self.folder)}/*.parquet name all"
            )
        if counts["long_captions"]:
            said.append(
                f"{counts['long_captions']} captions have more than {DEFAULT_PROMPT_TOKENS} tokens, where training cuts them"
                f" unless train_lora.py --max_prompt_tokens is raised; first {shown(first['long_captions'])}"
            )
        return said

    def _sample(self, row: int) -> tuple[bytes, bytes, dict[str, Any], list[str]]:
        """txt member, json member, the record for NNNNNN.parquet without places, and the texts that were encoded, the first
        of which is txt's. Shards made elsewhere may lack both members."""
        index = self.index
        shard, bucket = int(index.shard[row]), self.images.buckets[index.bucket[row]]
        text, body = (
            self._reader.read(shard, int(offset[row]), int(size[row]))
            for offset, size in ((index.txt_offset, index.txt_size), (index.json_offset, index.json_size))
        )
        known = {} if "indexed_by" in self.images.options else json.loads(body)
        caption, texts = text.decode("utf-8", "replace"), []
        try:
            texts = texts_of(self._reader, index, row, self.variants, "replace")
            caption = texts[0]
        except (ValueError, KeyError):  # then the sample is left out
            pass
        text = caption.encode() if self.variants.identity() else text
        record: dict[str, Any] = dict.fromkeys(SHARD_ROWS.names, -1)
        record |= {"key": str(index.key[row]), "path": str(index.path[row]), "width": bucket.width}
        record |= {"height": bucket.height, "caption": caption, "caption_length": len(caption)}
        record["weight"] = float(index.weight[row])
        body = body or json.dumps({name: record[name] for name in ("key", "path", "caption")}).encode()
        record |= {name: known[name] for name in ("original_width", "original_height") if name in known}
        record |= dict(zip(_CROP, known.get("crop", ()), strict=False))
        record |= {"status": "ok", "reason": "", "detail": "", "sha256": str(known.get("sha256", ""))}
        record |= dict.fromkeys(PAIR_ROWS.names, 0) | {"sources": "", "source_sha256": ""} | NO_MASK
        record["mask_sha256"] = str(known.get("mask", {}).get("sha256", ""))
        if bucket.sources:
            (width, height), *others = bucket.sources
            record["sources"] = bucket_name(width, height, others)
            record["source_sha256"] = ",".join(str(source["sha256"]) for source in known.get("sources", ()))
        record |= {"copied": False, "frames": 0, "prompt_tokens": 0, VARIANT_TOKENS: [0] * self.variants.count}
        return text, body, record, texts

    def finish(self) -> Manifest:
        """Write index, sizes and manifest; every shard must be there. Ranks that end together write the same bytes."""
        stats = {number: self._stats(shard) for shard, number in enumerate(self._numbers)}
        committed = {number: found for number, found in stats.items() if found is not None}
        assert len(committed) == len(stats), "a shard is missing"
        if not any(found["samples"] for found in committed.values()):
            raise ValueError(f"no sample of {len(self.index)} could be read; {self.folder}/*.parquet say why")
        return finalize(
            self.folder,
            committed,
            payload="safetensors",
            fingerprint=self.fingerprint,
            options={"images": self.images.fingerprint, "latent_std": self.encoding["latent_std"]}
            | {name: self.images.options[name] for name in ("each_image",) if name in self.images.options},
            versions=_versions(),
            encoding=self.encoding,
        )


def caption_tokens(record: dict[str, Any]) -> int:
    """Of a sample's embedding those of its caption and the template's end."""
    return record["prompt_tokens"] - record["picture_tokens"]


def bucket_of(record: dict[str, Any]) -> str:
    return bucket_name(record["width"], record["height"], sizes_of(record["sources"]))


def _read(path: Path) -> dict[str, Any] | None:
    """encoding.json; None when there is none or it is damaged."""
    try:
        fields = json.loads(read_regular(path))
        return fields if isinstance(fields["fingerprint"], str) else None
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return None


_CROP = ("crop_left", "crop_top", "crop_width", "crop_height")


def _versions() -> dict[str, str]:
    from importlib.metadata import version

    return {name: version(name) for name in ("torch", "diffusers", "transformers", "safetensors")}
