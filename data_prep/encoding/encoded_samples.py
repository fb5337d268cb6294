"""The samples of an image shard on their way through the encoders: read ahead, batched, broken ones told apart."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from data_prep.shard_format.shards import Manifest, ShardIndex, ShardReader
from files.shown import one_line, shown

if TYPE_CHECKING:
    import torch

    from data_prep.encoding.encoders import Encoders

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
                if number % (in_window := max(1, WINDOW // self.batch_size)) == 0:
                    window = batches[number : number + in_window]
                    captions = {int(row): self._caption(int(row)) for part in window for row in part}
                    texts = [text for text in captions.values() if isinstance(text, str)]
                    prompts = self.encoders.encode_captions(texts, self.batch_size)
                images = {row: future.result() for row, future in ahead.items()}
                ahead = self._submit(pool, batches[number + 1]) if number + 1 < len(batches) else {}
                yield from self._encode(images, captions, prompts)

    def _encode(
        self,
        images: dict[int, np.ndarray | ValueError],
        captions: dict[int, str | ValueError],
        prompts: dict[str, torch.Tensor],
    ) -> Iterator[Sample]:
        pixels: dict[int, np.ndarray] = {}
        texts: dict[int, str] = {}
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
            latents = self.encoders.encode_images(list(pixels.values()))
            for (row, text), tensors in zip(texts.items(), latents, strict=True):
                yield row, {**tensors, "prompt_embeds": prompts[text]}

    def _submit(self, pool: ThreadPoolExecutor, batch: np.ndarray) -> dict[int, Future[np.ndarray | ValueError]]:
        return {int(row): pool.submit(self._image, int(row)) for row in batch}

    def _image(self, row: int) -> np.ndarray | ValueError:
        from data_prep.images.stored_pixels import decode_stored

        bucket, index = self.manifest.buckets[self.index.bucket[row]], self.index
        place = int(index.shard[row]), int(index.payload_offset[row]), int(index.payload_size[row])
        data = self.reader.read(*place)
        try:
            return decode_stored(data, bucket.width, bucket.height)
        except (ValueError, OSError, SyntaxError) as error:  # what Pillow raises for damaged files
            return ValueError(str(error))

    def _caption(self, row: int) -> str | ValueError:
        place = int(self.index.shard[row]), int(self.index.txt_offset[row]), int(self.index.txt_size[row])
        try:
            return self.reader.read(*place).decode("utf-8")
        except UnicodeDecodeError as error:
            return ValueError(f"caption: {error}")
