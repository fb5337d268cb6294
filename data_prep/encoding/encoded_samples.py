"""The samples of an image shard on their way through the encoders: read ahead, batched, broken ones told apart."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from data_prep.encoding.caption_variants import FIRST, Variants
from data_prep.encoding.encoders import VARIANT
from data_prep.shard_format.shards import (
    Manifest,
    ShardIndex,
    ShardReader,
    captions_of,
    members_of,
    original_sizes,
)
from files.shown import one_line, shown

if TYPE_CHECKING:
    import torch

    from data_prep.encoding.encoders import Encoders
    from qwen_image.encoders.source_images import SourceImage

    # the target's pixels, the source images of a pair, and the mask on the latent grid
    Images = tuple[np.ndarray, list[SourceImage], np.ndarray | None]
    Sample = tuple[int, dict[str, torch.Tensor] | ValueError]  # row of the image index, tensors or why there are none

WINDOW = 128  # captions that are sorted by length before they are cut into batches, so that little is padded


@dataclass
class EncodedSamples:
    """How the samples of a shard come to their tensors: bucket by bucket, images decoded ahead in threads."""

    encoders: Encoders
    reader: ShardReader
    manifest: Manifest
    index: ShardIndex
    batch_size: int
    threads: int
    skip_broken: bool
    variants: Variants = FIRST

    def of(self, rows: np.ndarray) -> Iterator[Sample]:
        """(row, tensors, or why it cannot be read) of every sample of `rows`. Memory is that of one window of captions.

        Raises ValueError at the first sample that cannot be read, unless broken ones are skipped.
        """
        ordered = rows[np.argsort(self.index.bucket[rows], kind="stable")]
        cuts = np.flatnonzero(np.diff(self.index.bucket[ordered])) + 1
        batches = [
            part[start : start + self.batch_size]
            for part in np.split(ordered, cuts)
            for start in range(0, len(part), self.batch_size)
        ]
        with ThreadPoolExecutor(self.threads) as pool:
            ahead = self._submit(pool, batches[0]) if batches else {}
            for number in range(len(batches)):
                if number % (in_window := max(1, WINDOW // self.batch_size // self.variants.count)) == 0:
                    window = batches[number : number + in_window]
                    captions = {int(row): self._texts(int(row)) for part in window for row in part}
                    texts = [text for found in captions.values() if isinstance(found, list) for text in found]
                    paired = bool(self.manifest.buckets[self.index.bucket[batches[number][0]]].sources)
                    prompts = {} if paired else self.encoders.encode_captions(texts, self.batch_size)
                images = {row: future.result() for row, future in ahead.items()}
                ahead = self._submit(pool, batches[number + 1]) if number + 1 < len(batches) else {}
                yield from self._encode(images, captions, prompts)

    def _encode(
        self,
        images: dict[int, Images | ValueError],
        captions: dict[int, list[str] | ValueError],
        prompts: dict[str, torch.Tensor],
    ) -> Iterator[Sample]:
        pixels: dict[int, Images] = {}
        texts: dict[int, list[str]] = {}
        for row, image in images.items():
            caption = captions[row]
            if not isinstance(image, ValueError) and not isinstance(caption, ValueError):
                pixels[row], texts[row] = image, caption
                continue
            broken = image if isinstance(image, ValueError) else caption
            assert isinstance(broken, ValueError)
            where = f"{shown(self.index.key[row])} in {self.manifest.shards[self.index.shard[row]].name}"
            message = f"{where} ({shown(self.index.path[row])}) cannot be read: {broken}"
            if not self.skip_broken:
                raise ValueError(f"{message}; --on_broken_sample skip leaves it out")
            print(f"left out: {one_line(message)}", file=sys.stderr)
            yield row, broken
        if pixels:
            import torch

            latents = self.encoders.encode_images([target for target, *_ in pixels.values()])
            for (row, (first, *others)), tensors in zip(texts.items(), latents, strict=True):
                _, sources, mask = pixels[row]
                if mask is not None:
                    tensors["mask"] = torch.from_numpy(mask)
                if sources:
                    told = self.encoders.encode_pair(first, sources, others)
                else:
                    told = {"prompt_embeds": prompts[first]}
                    told |= {f"{VARIANT}{number}": prompts[text] for number, text in enumerate(others, start=2)}
                yield row, tensors | told

    def _submit(self, pool: ThreadPoolExecutor, batch: np.ndarray) -> dict[int, Future[Images | ValueError]]:
        return {int(row): pool.submit(self._images, int(row)) for row in batch}

    def _images(self, row: int) -> Images | ValueError:
        from data_prep.images.stored_pixels import decode_stored
        from qwen_image.encoders.source_images import SourceImage

        bucket, index = self.manifest.buckets[self.index.bucket[row]], self.index
        place = int(index.shard[row]), int(index.payload_offset[row]), int(index.payload_size[row])
        data = self.reader.read(*place)
        try:
            target = decode_stored(data, bucket.width, bucket.height)
            stored = self._sources(row)
            if len(stored) != len(bucket.sources):
                return ValueError(f"it has {len(stored)} source images, its bucket {len(bucket.sources)}")
            sizes = zip(stored, bucket.sources, strict=True)
            sources = [SourceImage(decode_stored(one, *size), *before) for (one, before), size in sizes]
            return target, sources, self._mask(row)
        except (ValueError, OSError, SyntaxError) as error:  # what Pillow raises for damaged files
            return ValueError(str(error))

    def _sources(self, row: int) -> list[tuple[bytes, tuple[int, int]]]:
        """The bytes of a pair's source images, each with its width and height before it was packed."""
        if not self.index.sources_size[row]:
            return []
        shard = int(self.index.shard[row])
        run = self.reader.read(shard, int(self.index.sources_offset[row]), int(self.index.sources_size[row]))
        record = self.reader.read(shard, int(self.index.json_offset[row]), int(self.index.json_size[row]))
        return list(zip(members_of(run), original_sizes(record), strict=True))

    def _mask(self, row: int) -> np.ndarray | None:
        """uint8 [H/8, W/8]; None of a sample without a mask."""
        from data_prep.images.stored_pixels import decode_mask, latent_mask

        bucket, index = self.manifest.buckets[self.index.bucket[row]], self.index
        if not index.mask_size[row]:
            return None
        data = self.reader.read(int(index.shard[row]), int(index.mask_offset[row]), int(index.mask_size[row]))
        return latent_mask(decode_mask(data, bucket.width, bucket.height))

    def _texts(self, row: int) -> list[str] | ValueError:
        """What is encoded of a sample's captions, each text once."""
        try:
            return list(dict.fromkeys(texts_of(self.reader, self.index, row, self.variants)))
        except (ValueError, KeyError) as error:  # UnicodeDecodeError among them
            return ValueError(f"caption: {error}")


def texts_of(reader: ShardReader, index: ShardIndex, row: int, variants: Variants, errors: str = "strict") -> list[str]:
    """What becomes of a sample's captions, equal ones as often as they were drawn. Raises ValueError for what is no text."""
    shard = int(index.shard[row])
    captions = [reader.read(shard, int(index.txt_offset[row]), int(index.txt_size[row])).decode("utf-8", errors)]
    if index.captions[row] > 1:
        captions = captions_of(reader.read(shard, int(index.json_offset[row]), int(index.json_size[row])))
    return variants.of(captions, str(index.path[row]) or str(index.key[row]))
