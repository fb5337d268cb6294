"""`--loader webdataset`: batches from shards that can't be indexed (a pipe, a server without byte ranges), one after another.

The weaker promise, compared with train/loader/indexed_loader.py: nothing here is a function of (seed, epoch) and a position.
Ranks and workers get whole shards, drawn at random with replacement, and shuffle within a buffer of samples. So the order
depends on the number of ranks and workers; a sample may come twice before another comes once; a resumed run goes on with
other samples than the uninterrupted one would have seen; and no sample can be held out for validation. What does hold: the
same command gives the same batches, and no two ranks, workers or resumptions draw the same noise.

    dataset = StreamedSet("pipe:cat photos-{000..099}.tar", print, cache_folder)
    with StreamLoader(dataset.urls, batch_size, sampling, reading, empty_prompt=dataset.empty_prompt) as loader: …

What is known of the data beforehand is its manifest, or what the first samples look like.
"""

import hashlib
import itertools
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from random import Random
from typing import Any

import numpy as np
import torch
from torch.utils.data import IterableDataset, get_worker_info

from data_prep.encoding.caption_variants import PLAIN, CaptionOptions, caption_chance
from data_prep.images.stored_pixels import decode_stored
from data_prep.shard_format.shards import (
    EMPTY_PROMPT,
    MANIFEST,
    MASK_SUFFIX,
    Bucket,
    Manifest,
    captions_of,
    read_manifest,
    variant_suffix,
    variants_of,
)
from qwen_image.model.sizes import LATENT_CHANNELS, VAE_FACTOR
from train.data.batch import Batch, collate
from train.data.draws import sample_draws
from train.data.remote_shards import Remote, is_remote, write_whole
from train.data.sample import (
    BrokenSample,
    Sample,
    draw_variant,
    read_empty_prompt,
    read_encoded,
    read_mask,
    read_variant,
    white_mask,
)
from train.data.sample_order import places
from train.flow.timestep_sampling import SigmaSampling
from train.loader.worker_loader import DEFAULTS, Batches, Reading

BUFFER = 1000  # samples that are shuffled together
LOOK = 64  # samples that are looked at where there is no manifest


class StreamedSet:
    """What is known of a stream's data (train.data.sample.DataSet). No sample of it can be read by number or held out.

    Args:
        data: a folder of shards, here or remote, or what webdataset takes (`pipe:…`, braces, a URL of one tar).
        cache_folder: where manifest and empty prompt of a remote folder are copied to.
        captions: what becomes of the captions of image shards.

    Attributes:
        urls: what webdataset reads.

    Raises FileNotFoundError, or ValueError for encoded shards without the manifest that says what encoded them.
    """

    def __init__(
        self, data: str, say: Callable[[str], None], cache_folder: Path, captions: CaptionOptions = PLAIN
    ) -> None:
        self.name, self.captions = data, captions
        self.urls: list[str] | str = data
        listed = not data.startswith("pipe:") and "{" not in data and not data.endswith(".tar")
        folder = copy_facts(data, cache_folder.expanduser()) if listed and is_remote(data) else Path(data)
        if listed and (folder / MANIFEST).is_file():
            self.manifest = read_manifest(folder)
            self.urls = [f"{data.rstrip('/')}/{shard.name}" for shard in self.manifest.shards]
        else:
            if listed:
                self.urls = [str(path) for path in sorted(folder.glob("*.tar"))]
            if not self.urls:
                raise FileNotFoundError(f"data: {data} holds no shards (*.tar): give a folder of them, or their URLs")
            self.manifest = look(self.urls)
            largest = self.manifest.buckets[0]
            say(
                f"{data} has no {MANIFEST}: the memory plan takes {largest.width}×{largest.height}, the largest of its "
                f"first {LOOK} images, for the largest of all"
            )
        self.encoded, self.paired = self.manifest.payload == "safetensors", False
        if any(bucket.sources for bucket in self.manifest.buckets):
            raise ValueError(
                f"data: {data} holds pairs (source images), which loader webdataset does not read: use indexed"
            )
        self.fingerprint = self.manifest.fingerprint
        self.masked = int(self.manifest.totals.get("masked", 0))
        self.index = None
        self.training = np.array([], dtype=np.int64)
        self.empty_prompt: torch.Tensor | None = None
        if self.encoded:
            self.empty_prompt = read_empty_prompt(folder / EMPTY_PROMPT)
        self.prompt_width = 0 if self.empty_prompt is None else self.empty_prompt.shape[1]

    def __len__(self) -> int:
        """Samples of the whole set; 0 where nobody knows."""
        return int(self.manifest.totals.get("samples", 0))


def copy_facts(url: str, cache_folder: Path) -> Path:
    """Copy a remote folder's manifest and empty prompt into a folder of their own, which is returned."""
    folder = cache_folder / f"stream-{hashlib.sha256(url.encode()).hexdigest()[:16]}"
    folder.mkdir(parents=True, exist_ok=True)
    remote = Remote(url)
    try:
        write_whole(folder / MANIFEST, [remote.read(MANIFEST)])
    except FileNotFoundError:
        raise FileNotFoundError(f"{url} holds no {MANIFEST}; for plain shards give their URLs, with braces") from None
    try:
        write_whole(folder / EMPTY_PROMPT, [remote.read(EMPTY_PROMPT)])
    except FileNotFoundError:
        pass  # image shards have none
    return folder


def look(urls: list[str] | str) -> Manifest:
    """A manifest made of the first samples: the kind of payload and one bucket of the largest width and height."""
    import webdataset

    width = height = masked = 0
    for raw in itertools.islice(webdataset.WebDataset(urls, shardshuffle=False), LOOK):
        if "safetensors" in raw:
            raise ValueError(
                f"{raw['__url__']} holds encoded samples, but no {MANIFEST} says for which model: give the folder that "
                "encode_shards.py wrote"
            )
        if "source_image.jpg" in raw or "source_image.png" in raw:
            raise ValueError(f"{raw['__url__']} holds pairs (source images), which loader webdataset does not read")
        masked += MASK_SUFFIX in raw
        size = image_size(next(raw[suffix] for suffix in ("jpg", "jpeg", "png") if suffix in raw))
        width, height = max(width, size[0]), max(height, size[1])
    if not width:
        raise ValueError(f"{urls} holds no samples")
    fingerprint = hashlib.sha256(repr(urls).encode()).hexdigest()
    return Manifest("jpg", fingerprint, {}, [Bucket(0, width, height, 0)], {"masked": masked}, [], {})


class StreamLoader(Batches):
    """Batches by the `webdataset` library; see the module for what it can't promise. A broken sample is left out.

    Args:
        urls: what webdataset takes: paths, http URLs, `pipe:` commands, braces.
        reading: `consumed` micro-batches of an earlier run are counted on from, and change the shuffle, no more.
        empty_prompt: [5, D] for caption dropout; encoded shards need it.
        total: samples of the whole set, for `epoch`; 0 where nobody knows.
        captions: what becomes of images' captions.
        variants: encoded samples may have several forms of their captions.
    """

    def __init__(
        self,
        urls: str | list[str],
        batch_size: int,
        sampling: SigmaSampling,
        reading: Reading = DEFAULTS,
        *,
        seed: int = 0,
        empty_prompt: torch.Tensor | None = None,
        max_prompt_tokens: int = 512,
        buffer: int = BUFFER,
        total: int = 0,
        captions: CaptionOptions = PLAIN,
        variants: bool = False,
    ) -> None:
        shuffle_seed = (seed * 1_000_003 + reading.rank) * 1_000_003 + reading.consumed
        source = StreamedBatches(
            urls,
            batch_size,
            buffer,
            shuffle_seed,
            seed,
            sampling,
            empty_prompt,
            max_prompt_tokens,
            reading,
            captions,
            variants,
        )
        self._places = places(reading.consumed, reading.rank, reading.world, reading.accumulation)
        super().__init__(source, None, reading, {"loader": "webdataset"}, total / batch_size, "left out")

    def arrived(self, batch: Batch) -> None:
        batch.place = next(self._places)


class StreamedBatches(IterableDataset[Any]):
    """What runs in the workers: webdataset's samples, sorted into batches of one size as they come."""

    def __init__(
        self,
        urls: str | list[str],
        batch_size: int,
        buffer: int,
        shuffle_seed: int,
        seed: int,
        sampling: SigmaSampling,
        empty_prompt: torch.Tensor | None,
        max_prompt_tokens: int,
        reading: Reading,
        captions: CaptionOptions,
        variants: bool,
    ) -> None:
        self.captions, self.variants = captions, variants
        self.urls, self.batch_size, self.buffer, self.shuffle_seed = urls, batch_size, buffer, shuffle_seed
        self.seed, self.sampling, self.caption_dropout = seed, sampling, reading.caption_dropout
        self.empty_prompt, self.max_prompt_tokens = empty_prompt, max_prompt_tokens
        self.text_padding, self.attempts, self.masks = reading.text_padding, reading.attempts, reading.masks

    def __iter__(self) -> Iterator[Batch | BrokenSample]:
        waiting: dict[tuple[int, int], list[Sample]] = defaultdict(list)
        came, broken, in_a_row = Counter[str](), list[str](), 0

        def failed(name: str, error: Exception) -> bool:
            """True, which webdataset takes for "go on"; after too many in a row the end of the stream."""
            nonlocal in_a_row
            in_a_row += 1
            broken.append(f"{name}: {' '.join(str(error).split())}")
            if in_a_row > self.attempts:
                raise BrokenSample(broken[-1]) from None
            return True

        worker = get_worker_info()
        seed = self.shuffle_seed * 1_000_003 + (worker.id if worker else 0)
        try:
            for raw in self.samples(seed, lambda error: failed("a shard", error)):
                try:
                    sample = self.decode(raw)
                except Exception as error:  # decoders raise whatever they like
                    failed(f"{raw['__key__']} in {raw['__url__']}", error)
                    continue
                in_a_row = 0
                group = waiting[sample.width, sample.height]
                group.append(sample)
                if len(group) == self.batch_size:
                    yield self.make(group, seed, came, broken)
                    waiting.pop((sample.width, sample.height))
                    broken = []
        except BrokenSample as error:
            yield error.with_traceback(None)

    def samples(self, seed: int, handler: Callable[[Exception], bool]) -> Iterator[dict[str, Any]]:
        """webdataset's samples, undecoded, from shards drawn with replacement; `seed` alone decides which."""
        import webdataset

        shards = webdataset.ResampledShards(self.urls, seed=seed, worker_seed=lambda: 0, deterministic=True)
        read = webdataset.tarfile_to_samples(handler=handler)
        return iter(webdataset.DataPipeline(shards, read, webdataset.shuffle(self.buffer, seed=seed)))

    def decode(self, raw: dict[str, Any]) -> Sample:
        """A sample as webdataset gives it: undecoded bytes by suffix."""
        key, caption = raw["__key__"], raw.get("txt", b"").decode("utf-8")
        if "safetensors" in raw:
            assert self.empty_prompt is not None
            found = read_encoded(raw["safetensors"], self.empty_prompt.shape[1])
            embeds = found.prompt_embeds[: self.max_prompt_tokens]
            height, width = (side * VAE_FACTOR for side in found.latent.shape[-2:])
            variants = tuple(
                (each, raw[variant_suffix(number)] if number > 1 else b"")
                for number, each in enumerate(variants_of(raw.get("json", b"{}")) if self.variants else (), start=1)
            )
            sample = Sample(
                0, key, width, height, caption, latent=found.latent, prompt_embeds=embeds, variants=variants
            )
            return replace(sample, mask=self.mask_of(found.mask, width, height))
        data = next(raw[suffix] for suffix in ("jpg", "jpeg", "png") if suffix in raw)
        pixels = torch.from_numpy(decode_stored(data, *image_size(data)).copy()).permute(2, 0, 1).contiguous()
        several, size = tuple(all_captions(raw, caption)), (pixels.shape[2], pixels.shape[1])
        mask = self.mask_of(read_mask(raw[MASK_SUFFIX], *size) if self.masks and MASK_SUFFIX in raw else None, *size)
        return Sample(0, key, *size, caption, pixels=pixels, captions=several, mask=mask)

    def mask_of(self, mask: torch.Tensor | None, width: int, height: int) -> torch.Tensor | None:
        """A sample's mask where masks are wanted: white where it has none."""
        return (white_mask(width, height) if mask is None else mask) if self.masks else None

    def with_caption(self, sample: Sample, chance: Random) -> Sample:
        """The sample with the caption that is trained: drawn of an image's; of an encoded sample's variants one."""
        if sample.pixels is not None:
            return replace(sample, caption=self.captions.drawn(sample.captions, chance))
        number = draw_variant([variant for variant, _ in sample.variants], chance) if sample.variants else 0
        if number == 0:
            return sample
        assert sample.prompt_embeds is not None
        variant, payload = sample.variants[number]
        embeds = read_variant(payload, sample.prompt_embeds.shape[1], variant.tokens)[: self.max_prompt_tokens]
        return replace(sample, caption=variant.caption, prompt_embeds=embeds)

    def make(self, samples: list[Sample], seed: int, came: Counter[str], broken: list[str]) -> Batch:
        """A batch; `came` counts how often each sample has come to this worker since it began with `seed`."""
        width, height = samples[0].width, samples[0].height
        shape = (LATENT_CHANNELS, height // VAE_FACTOR, width // VAE_FACTOR)
        draws, indices = [], []
        for place, sample in enumerate(samples):
            digest = hashlib.blake2b(f"{sample.key} {seed}".encode(), digest_size=7).digest()
            indices.append(int.from_bytes(digest, "little"))
            times = came[sample.key]
            samples[place] = self.with_caption(sample, caption_chance(self.seed, times, indices[-1]))
            draws.append(sample_draws(self.seed, times, indices[-1], shape, self.sampling, self.caption_dropout))
            came[sample.key] += 1
        tensors = collate(samples, draws, self.empty_prompt, self.text_padding)
        return Batch(place=0, epoch=0, indices=indices, broken=broken, **tensors)


def all_captions(raw: dict[str, Any], caption: str) -> list[str]:
    """Those in the json of a sample that make_shards.py packed, where it has several; else its one caption."""
    try:
        captions = captions_of(raw["json"]) if b'"captions"' in raw.get("json", b"") else [caption]
    except (ValueError, KeyError, TypeError, RecursionError):  # another program's json
        return [caption]
    return captions if captions[0] == caption else [caption]


def image_size(data: bytes) -> tuple[int, int]:
    """Width and height from the header."""
    import io

    from PIL import Image

    with Image.open(io.BytesIO(data), formats=("JPEG", "PNG", "WEBP")) as image:
        return image.size
