"""Samples and batches: from a folder of shards (images or encoded) to the tensors of one micro-batch.

    dataset = ShardDataset("ENCODED", validation_samples=16)
    order = dataset.order(batch_size=4, seed=0)
    epoch, indices = order.micro_batch(place)
    batch = make_batch(dataset, place, epoch, indices, draw)        # draw: sample_draws with its rest bound

All of it is random access by index and free of state: train/data/sample_order.py says what comes when,
train/loader/indexed_loader.py who reads it.
"""

import hashlib
import json
import tarfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from random import Random
from typing import NamedTuple

import numpy as np
import torch
from filelock import FileLock

from data_prep.encoding.caption_variants import PLAIN, CaptionOptions
from data_prep.images.stored_pixels import decode_stored
from data_prep.shard_format.shard_changes import altered_shards, shard_states
from data_prep.shard_format.shards import (
    EMPTY_PROMPT,
    INDEX,
    MANIFEST,
    Manifest,
    ShardIndex,
    ShardReader,
    bucket_name,
    captions_of,
    check_index,
    members_of,
    original_sizes,
    padded,
    read_index,
    read_manifest,
    variants_of,
)
from files.shown import shown
from qwen_image.model.sizes import LATENT_CHANNELS, VAE_FACTOR
from train.data.remote_shards import RemoteReader, Unreachable, is_remote, open_remote
from train.data.sample import (
    BrokenSample,
    Encoded,
    Sample,
    draw_variant,
    read_empty_prompt,
    read_encoded,
    read_mask,
    read_variant,
    white_mask,
)
from train.data.sample_order import WINDOW, Order, Tail

# A sample's members stand next to each other in our shards: one read fetches them when no more than this lies between.
_GAP = 1 << 16


class Part(NamedTuple):
    """What is trained of one set: its name as it was given, its samples, and whether it is a prior set."""

    name: str
    samples: np.ndarray  # int64 indices
    prior: bool = False


class ShardDataset:
    """Random access to the samples of a folder of shards; image shards and encoded shards alike. Picklable.

    Args:
        folder: what make_shards.py or encode_shards.py wrote, here or remote (s3://, hf://, http:// …;
        train/data/remote_shards.py), or
            plain WebDataset shards, which are scanned once.
        validation_samples: this many samples are held out of training: those with the smallest sha256 of their source
            path. So the choice depends on nothing but the sample's name, and is the same for images and encoded shards.
        max_prompt_tokens: encoded prompts are cut to their first so many tokens, as the pipeline does.
        say: where notes go (one line each).
        cache_folder: where the local copies of a remote set go.
        captions: what becomes of the captions of image shards; encoded ones have their form.
        masks: samples come with their masks; white ones where they have none.

    Attributes:
        name: `folder` as it was given, for messages.
        encoded: the shards hold latents and prompt embeddings.
        training, validation: int64 arrays of sample indices; together all samples.
        empty_prompt: [5, D] embedding of the empty caption for caption dropout; None for image shards and for pairs, whose
            samples have their own.
        paired: the samples are pairs, of a target and its source images.
        masked: so many samples have a mask.

    Raises:
        FileNotFoundError: no such folder, no shards, a shard or the empty prompt is missing.
        ValueError: damaged manifest or index, or fewer samples than `validation_samples` + 1.
    """

    def __init__(
        self,
        folder: str | Path,
        validation_samples: int = 0,
        max_prompt_tokens: int = 512,
        say: Callable[[str], None] = print,
        cache_folder: Path = Path("~/.cache/qwen_image_lora"),
        captions: CaptionOptions = PLAIN,
        masks: bool = False,
    ) -> None:
        self.name = str(folder)
        remote = open_remote(str(folder), cache_folder.expanduser()) if is_remote(folder) else None
        self.folder = remote[0] if remote else Path(folder)
        self.manifest, self.index = open_folder(self.folder, say, local=remote is None)
        self.max_prompt_tokens, self.captions, self.masks = max_prompt_tokens, captions, masks
        self.masked = int((self.index.mask_share >= 0).sum())
        self.encoded = self.manifest.payload == "safetensors"
        self._sizes = {bucket.id: (bucket.width, bucket.height) for bucket in self.manifest.buckets}
        self._sources = {bucket.id: bucket.sources for bucket in self.manifest.buckets}
        self.paired = any(self._sources.values())
        self.reader = remote[1] if remote else ShardReader(self.folder, self.manifest)
        if len(self) <= validation_samples:
            raise ValueError(
                f"{folder} holds {len(self)} samples, validation_samples={validation_samples} of them held out: "
                "nothing is left to train on"
            )
        self._together = self.manifest.options.get("each_image") == "all"  # all sizes of an image fall on one side
        self.validation = held_out(self.folder, validation_samples, self._together)
        self.training = np.delete(np.arange(len(self), dtype=np.int64), self.validation)
        if not len(self.training):
            raise ValueError(
                f"{folder} holds {len(self)} samples; validation_samples={validation_samples}, with all sizes of their images, "
                "leaves nothing to train on"
            )
        self.empty_prompt: torch.Tensor | None = None
        if self.encoded and not self.paired:
            self.empty_prompt = read_empty_prompt(self.folder / EMPTY_PROMPT)
        self.prompt_width = prompt_width(self.manifest, self.empty_prompt)

    def __len__(self) -> int:
        return len(self.index)

    @property
    def fingerprint(self) -> str:
        """Names this data set; a checkpoint of another one is refused."""
        return self.manifest.fingerprint

    def shard_states(self) -> dict[str, str]:
        """What changes when a shard does, for a checkpoint; nothing of a remote set, whose copies are compared when fetched."""
        return {} if isinstance(self.reader, RemoteReader) else shard_states(self.folder, self.manifest)

    def check_unchanged(self, remembered: dict[str, str], say: Callable[[str], None]) -> None:
        """Raises ValueError where a shard has changed since its state was `remembered`, and is not the manifest's any more."""
        if isinstance(self.reader, RemoteReader) or not remembered:
            return
        if altered := altered_shards(self.folder, self.manifest, remembered, say):
            names = ", ".join(map(shown, altered[:3])) + (", …" if len(altered) > 3 else "")
            raise ValueError(
                f"data: {len(altered)} of {len(self.manifest.shards)} shards in {shown(self.folder)} were edited since the "
                f"checkpoint was written and are not what {MANIFEST} says ({names}): copy them back, or pack anew "
                "(--resume_ignore_data goes on with what is there, from its beginning)"
            )

    @property
    def parts(self) -> list[Part]:
        """What is trained, by set."""
        return [Part(self.name, self.training)]

    def remote_shards(self) -> list[tuple[RemoteReader, np.ndarray]]:
        """The reader of a remote set, and the shard of each sample; none of one that lies here."""
        return [(self.reader, self.index.shard)] if isinstance(self.reader, RemoteReader) else []

    def size(self, index: int) -> tuple[int, int]:
        """Width and height in pixels, without reading the sample."""
        return self._sizes[int(self.index.bucket[index])]

    def order(
        self, batch_size: int, seed: int = 0, window: int = WINDOW, tail: Tail = "auto", repeat: int = 1
    ) -> Order:
        """The order of training over everything that isn't held out, each sample as often as its weight says."""
        i = self.index
        return Order(i.bucket, i.shard, batch_size, seed, window, tail, repeat, self.training, i.weight)

    def training_subset(self, count: int) -> np.ndarray:
        """Sorted indices of `count` training samples (all, where there are fewer), chosen as those held out are: the next."""
        chosen = held_out(self.folder, len(self.validation) + count, self._together)
        return np.setdiff1d(chosen, self.validation)

    def read(self, index: int, chance: Callable[[], Random] | None = None) -> Sample:
        """One sample. Raises BrokenSample when it can't be read or isn't what the index says, Unreachable for a dead remote.

        `chance` makes the generator that decides over its caption; without one the caption has the form that chance has no
        part in (CaptionOptions.first).
        """
        key = f"sample {index}"
        try:
            members = self._members(int(index))
            key = members["key"].decode(errors="replace")
            width, height = self.size(index)
            sample = Sample(int(index), key, width, height, members["txt"].decode("utf-8"))
            if self.masks:
                sample = replace(sample, mask=white_mask(width, height))
            if "mask" in members:
                sample = replace(sample, mask=read_mask(members["mask"], width, height))
            if not self.encoded:
                several = self.index.captions[index] > 1
                caption = self._caption(self._captions(int(index)) if several else [sample.caption], chance)
                sample = replace(sample, caption=caption, pixels=pixels_of(members["payload"], width, height))
                return self._with_sources(sample, int(index)) if self.paired else sample
            found = read_encoded(members["payload"], self.prompt_width)
            sizes = [(width, height), *self._sources[int(self.index.bucket[index])]]
            shapes = [tuple(latent.shape) for latent in (found.latent, *found.sources)]
            expected = [(LATENT_CHANNELS, h // VAE_FACTOR, w // VAE_FACTOR) for w, h in sizes]
            if shapes != expected:
                bucket = bucket_name(width, height, sizes[1:])
                raise ValueError(
                    f"latent has shape {', '.join(map(str, shapes))}, its bucket {bucket} needs "
                    f"{', '.join(map(str, expected))}"
                )
            draws = self.index.variant_tokens[index]
            tokens = int(draws[0] if len(draws) else self.index.prompt_tokens[index])
            if tokens not in (0, len(found.prompt_embeds)):
                raise ValueError(f"prompt_embeds has {len(found.prompt_embeds)} tokens, the index says {tokens}")
            if (found.mask is None) != (self.index.mask_share[index] < 0):
                raise ValueError(f"it has {'no mask' if found.mask is None else 'a mask'}, the index says otherwise")
            if self.masks and found.mask is not None:
                sample = replace(sample, mask=found.mask)
            if len(draws) and chance is not None:
                sample, found = self._variant(sample, found, int(index), chance())
            embeds = found.cut(self.max_prompt_tokens).prompt_embeds
            return replace(
                sample,
                latent=found.latent,
                prompt_embeds=embeds,
                sources=found.sources,
                empty_prompt=found.empty_prompt,
            )
        except Exception as error:  # decoders raise whatever they like; nothing is hidden, the message carries it all
            if isinstance(error, Unreachable):
                raise
            shard = self.reader.names[int(self.index.shard[index])]
            why = " ".join(f"{type(error).__name__}: {error}".split())
            raise BrokenSample(f"{key} in {self.folder / shard}: {why}") from error

    def _variant(self, sample: Sample, found: Encoded, index: int, chance: Random) -> tuple[Sample, Encoded]:
        """An encoded sample with the form of its caption that `chance` draws, which is read if it isn't the first."""
        i, shard = self.index, int(self.index.shard[index])
        variants = variants_of(self.reader.read(shard, int(i.json_offset[index]), int(i.json_size[index])))
        number = draw_variant(variants, chance) if variants else 0
        if number == 0:
            return sample, found
        drawn = variants[number]
        if any(
            draw >= i.variant_tokens.shape[1] or i.variant_tokens[index, draw] != drawn.tokens for draw in drawn.draws
        ):
            raise ValueError(f"variant {number + 1} has {drawn.tokens} tokens in its json, another number in the index")
        end = int(i.txt_offset[index]) + padded(int(i.txt_size[index]))
        embeds = read_variant(self.reader.read(shard, end + drawn.offset, drawn.size), self.prompt_width, drawn.tokens)
        return replace(sample, caption=drawn.caption), found._replace(prompt_embeds=embeds)

    def _captions(self, index: int) -> list[str]:
        """All captions of a sample that has several."""
        i = self.index
        return captions_of(self.reader.read(int(i.shard[index]), int(i.json_offset[index]), int(i.json_size[index])))

    def _caption(self, captions: list[str], chance: Callable[[], Random] | None) -> str:
        """What is trained of an image sample's captions."""
        if chance is None or not (self.captions.varies or len(captions) > 1):
            return self.captions.first(captions)
        return self.captions.drawn(captions, chance())

    def _with_sources(self, sample: Sample, index: int) -> Sample:
        """An image sample with the source images that the shard holds for it."""
        i, shard = self.index, int(self.index.shard[index])
        run = self.reader.read(shard, int(i.sources_offset[index]), int(i.sources_size[index]))
        record = self.reader.read(shard, int(i.json_offset[index]), int(i.json_size[index]))
        sizes, images = self._sources[int(i.bucket[index])], members_of(run)
        if len(images) != len(sizes):
            raise ValueError(f"it has {len(images)} source images, its bucket {len(sizes)}")
        pixels = tuple(pixels_of(image, *size) for image, size in zip(images, sizes, strict=True))
        return replace(sample, sources=pixels, source_sizes=tuple(original_sizes(record)))

    def source(self, index: int) -> str:
        """Where the sample came from (the path in its json), for messages."""
        i = self.index
        data = self.reader.read(int(i.shard[index]), int(i.json_offset[index]), int(i.json_size[index]))
        return str(json.loads(data).get("path", "")) if data else ""

    def same_bucket(self, index: int) -> Iterator[int]:
        """The other training samples of this sample's bucket, in a fixed order that starts after it."""
        members = self.training[self.index.bucket[self.training] == self.index.bucket[index]]
        start = int(np.searchsorted(members, index, side="right"))
        return (int(other) for other in np.roll(members, -start) if other != index)

    def other_buckets(self, index: int) -> Iterator[int]:
        """The training samples of all other buckets, in a fixed order that starts after this one."""
        members = self.training[self.index.bucket[self.training] != self.index.bucket[index]]
        start = int(np.searchsorted(members, index, side="right"))
        return (int(other) for other in np.roll(members, -start))

    def _members(self, index: int) -> dict[str, bytes]:
        """payload, txt and key, with one read where they are adjacent (the key stands in the payload's tar header); mask where
        there is one and masks are wanted."""
        i, shard = self.index, int(self.index.shard[index])

        def place(name: str) -> tuple[int, int]:
            return int(getattr(i, f"{name}_offset")[index]), int(getattr(i, f"{name}_size")[index])

        payload, size = place("payload")
        others = {name: place(name) for name in ("txt", *["mask"] * self.masks)}
        start, end = payload - tarfile.BLOCKSIZE, payload + size
        last = end
        for offset, length in others.values():
            if length and 0 <= offset - last <= _GAP:
                last = offset + length
        data = self.reader.read(shard, start, last - start)
        name = data[: data.index(b"\0")].rpartition(b"/")[2] if data[0] else b""
        found = {"key": name.split(b".")[0], "payload": data[payload - start : end - start], "txt": b""}
        for member, (offset, length) in others.items():
            if length:
                within = end <= offset and offset + length <= last
                run = data[offset - start : offset - start + length] if within else None
                found[member] = self.reader.read(shard, offset, length) if run is None else run
        return found


def pixels_of(image: bytes, width: int, height: int) -> torch.Tensor:
    """uint8 [3, H, W] of a stored image. Raises ValueError for one that is damaged or of another size."""
    return torch.from_numpy(decode_stored(image, width, height).copy()).permute(2, 0, 1).contiguous()


def prompt_width(manifest: Manifest, empty_prompt: torch.Tensor | None) -> int:
    """D of an encoded set's embeddings; 0 for images."""
    if empty_prompt is not None:
        return empty_prompt.shape[1]
    return int((manifest.encoding or {}).get("prompt_width", 0))


def open_folder(folder: Path, say: Callable[[str], None], local: bool = True) -> tuple[Manifest, ShardIndex]:
    """Manifest and index of a folder; plain WebDataset shards get theirs by scanning, once.

    `local`: the shards themselves are in it too. Raises FileNotFoundError naming what is missing, ValueError for what is
    damaged or can't be indexed, PermissionError where an index can't be written.
    """
    if not folder.is_dir():
        raise FileNotFoundError(f"no folder at {folder}")
    if not (folder / MANIFEST).is_file():  # first: a scan by another rank writes it last
        scan(folder, say)
    if not (folder / INDEX).is_file():
        raise lost(folder, INDEX, MANIFEST)
    manifest = read_manifest(folder)
    missing = [shard.name for shard in manifest.shards if local and not (folder / shard.name).is_file()]
    if missing:
        raise FileNotFoundError(
            f"{folder} lacks {len(missing)} of {len(manifest.shards)} shards ({', '.join(missing[:3])} …): copy them back"
        )
    index = read_index(folder, strings=False)
    check_index(index, manifest, folder)
    return manifest, index


def scan(folder: Path, say: Callable[[str], None]) -> None:
    """Index plain shards; one rank does it, the others wait."""
    from data_prep.shard_format.scan_tars import build_index

    if (folder / EMPTY_PROMPT).is_file():  # of encode_shards.py, whose manifest tells what a scan can't know
        raise lost(folder, MANIFEST, EMPTY_PROMPT)
    with FileLock(folder / ".index.lock"):  # a file that is written to: NFS locks no others
        if not (folder / MANIFEST).is_file():
            say(f"{folder} has no index: scanning its shards once")
            build_index(folder)


def lost(folder: Path, name: str, other: str) -> FileNotFoundError:
    return FileNotFoundError(f"{folder} has no {name}, but {other}: copy it back, or run the script that wrote it")


def held_out(folder: Path, count: int, together: bool = False) -> np.ndarray:
    """Sorted indices of the `count` samples whose source path (key, where there is none) has the smallest sha256.

    `together`: and of all others of the same path.
    """
    return first_by_name(names_in(folder), count, together) if count else np.array([], dtype=np.int64)


def names_in(folder: Path) -> list[str]:
    """What each sample is held out by: its source path, or its key where there is none."""
    index = read_index(folder)
    return [str(name) for name in np.where(index.path.astype(bool), index.path, index.key)]


def first_by_name(names: Sequence[str], count: int, together: bool = False) -> np.ndarray:
    """Sorted indices of the `count` names with the smallest sha256; `together`: and of all that are equal to one of them."""
    digests = [hashlib.sha256(name.encode()).digest() for name in names]
    chosen = sorted(range(len(digests)), key=digests.__getitem__)[:count]
    if together:
        held = {names[index] for index in chosen}
        chosen = [index for index, name in enumerate(names) if name in held]
    return np.sort(np.array(chosen, dtype=np.int64))
