"""Samples and batches: from a folder of shards (images or encoded) to the tensors of one micro-batch.

    dataset = ShardDataset("ENCODED", validation_samples=16)
    order = dataset.order(batch_size=4, seed=0)
    epoch, indices = order.micro_batch(place)
    batch = make_batch(dataset, place, epoch, indices, draw)        # draw: sample_draws with its rest bound

All of it is random access by index and free of state: train/data/sample_order.py says what comes when,
train/data/indexed_loader.py who reads it.
"""

import itertools
import json
import tarfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import safetensors.torch
import torch

from data_prep.images.stored_pixels import decode_stored
from data_prep.shard_format.shards import EMPTY_PROMPT, ShardReader
from qwen_image.encoders.text_encoder import Prompt
from train.data.data_folder import held_out, open_folder
from train.data.remote_shards import Unreachable, is_remote, open_remote
from train.data.sample_order import WINDOW, Order, Tail
from train.flow.objective import Draws

LATENT_CHANNELS = 16
VAE_FACTOR = 8  # pixels a latent on each side
ATTEMPTS = 16  # so many broken samples in a row are bad luck, more are a broken data set

# (epoch, virtual index, latent_shape) -> Draws: train.flow.objective.sample_draws with seed, distribution and dropout bound
DrawSample = Callable[[int, int, tuple[int, ...]], Draws]

# A sample's members stand next to each other in our shards: one read fetches them when no more than this lies between.
_GAP = 1 << 16


class BrokenSample(ValueError):
    """A sample that can't be read; the message names it and says why."""


@dataclass(frozen=True)
class Sample:
    """One sample as it stands in the shard: encoded (`latent`, `prompt_embeds`) or an image (`pixels`)."""

    index: int
    key: str
    width: int  # pixels
    height: int
    caption: str
    latent: torch.Tensor | None = None  # [16, H/8, W/8], normalised, as stored (bf16)
    prompt_embeds: torch.Tensor | None = None  # [T, D], cut to max_prompt_tokens
    pixels: torch.Tensor | None = None  # uint8 [3, H, W], RGB


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

    Attributes:
        encoded: the shards hold latents and prompt embeddings.
        training, validation: int64 arrays of sample indices; together all samples.
        empty_prompt: [5, D] embedding of the empty caption for caption dropout; None for image shards.

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
    ) -> None:
        remote = open_remote(str(folder), cache_folder.expanduser()) if is_remote(folder) else None
        self.folder = remote[0] if remote else Path(folder)
        self.manifest, self.index = open_folder(self.folder, say, local=remote is None)
        self.max_prompt_tokens = max_prompt_tokens
        self.encoded = self.manifest.payload == "safetensors"
        self._sizes = {bucket.id: (bucket.width, bucket.height) for bucket in self.manifest.buckets}
        self.reader = remote[1] if remote else ShardReader(self.folder, self.manifest)
        if len(self) <= validation_samples:
            raise ValueError(
                f"{folder} holds {len(self)} samples, validation_samples={validation_samples} of them held out: "
                "nothing is left to train on"
            )
        self.validation = held_out(self.folder, validation_samples)
        self.training = np.delete(np.arange(len(self), dtype=np.int64), self.validation)
        self.empty_prompt: torch.Tensor | None = None
        if self.encoded:
            path = self.folder / EMPTY_PROMPT
            if not path.is_file():
                raise FileNotFoundError(f"{path} is missing (caption dropout needs it): run encode_shards.py again")
            self.empty_prompt = safetensors.torch.load_file(path)["prompt_embeds"]

    def __len__(self) -> int:
        return len(self.index)

    @property
    def fingerprint(self) -> str:
        """Names this data set; a checkpoint of another one is refused."""
        return self.manifest.fingerprint

    def size(self, index: int) -> tuple[int, int]:
        """Width and height in pixels, without reading the sample."""
        return self._sizes[int(self.index.bucket[index])]

    def order(
        self, batch_size: int, seed: int = 0, window: int = WINDOW, tail: Tail = "auto", repeat: int = 1
    ) -> Order:
        """The order of training over everything that isn't held out."""
        return Order(self.index.bucket, self.index.shard, batch_size, seed, window, tail, repeat, self.training)

    def read(self, index: int) -> Sample:
        """One sample. Raises BrokenSample when it can't be read or isn't what the index says, Unreachable for a dead remote."""
        key = f"sample {index}"
        try:
            members = self._members(int(index))
            key = members["key"].decode(errors="replace")
            width, height = self.size(index)
            sample = Sample(int(index), key, width, height, members["txt"].decode("utf-8"))
            if not self.encoded:
                pixels = torch.from_numpy(decode_stored(members["payload"], width, height).copy())
                return replace(sample, pixels=pixels.permute(2, 0, 1).contiguous())
            tensors = safetensors.torch.load(members["payload"])
            latent, embeds = tensors["latent"], tensors["prompt_embeds"]
            expected = (LATENT_CHANNELS, height // VAE_FACTOR, width // VAE_FACTOR)
            if tuple(latent.shape) != expected:
                raise ValueError(
                    f"latent has shape {tuple(latent.shape)}, its bucket {width}x{height} needs {expected}"
                )
            if embeds.ndim != 2 or len(embeds) == 0:
                raise ValueError(f"prompt_embeds has shape {tuple(embeds.shape)}, must be [T, D] with T at least 1")
            return replace(sample, latent=latent, prompt_embeds=embeds[: self.max_prompt_tokens])
        except Exception as error:  # decoders raise whatever they like; nothing is hidden, the message carries it all
            if isinstance(error, Unreachable):
                raise
            shard = self.reader.names[int(self.index.shard[index])]
            why = " ".join(f"{type(error).__name__}: {error}".split())
            raise BrokenSample(f"{key} in {self.folder / shard}: {why}") from error

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

    def _members(self, index: int) -> dict[str, bytes]:
        """payload, txt and key, with one read where they are adjacent (the key stands in the payload's tar header)."""
        i, shard = self.index, int(self.index.shard[index])
        payload, payload_size = int(i.payload_offset[index]), int(i.payload_size[index])
        txt, txt_size = int(i.txt_offset[index]), int(i.txt_size[index])
        start, end = payload - tarfile.BLOCKSIZE, payload + payload_size
        one_read = txt_size > 0 and 0 <= txt - end <= _GAP
        data = self.reader.read(shard, start, (txt + txt_size if one_read else end) - start)
        caption = data[txt - start :] if one_read else self.reader.read(shard, txt, txt_size) if txt_size else b""
        name = data[: data.index(b"\0")].rpartition(b"/")[2] if data[0] else b""
        return {"key": name.split(b".")[0], "payload": data[payload - start : end - start], "txt": caption}


@dataclass
class Batch:
    """One micro-batch: samples of one bucket with all that chance decided for them. B samples."""

    place: int  # in the global stream of micro-batches
    epoch: int
    indices: list[int]  # virtual indices (Order.locate): sample + N · repeat number
    keys: list[str]
    width: int  # pixels
    height: int
    captions: list[str]  # "" where dropped
    noise: torch.Tensor  # float32 [B, 16, 1, H/8, W/8]
    sigma: torch.Tensor  # float32 [B], k/1000; stays on the CPU, where the modulation table is looked up
    drop: torch.Tensor  # bool [B]: the caption was dropped
    latents: torch.Tensor | None = None  # [B, 16, 1, H/8, W/8], dtype as stored
    pixels: torch.Tensor | None = None  # uint8 [B, 3, H, W]
    prompt_embeds: torch.Tensor | None = None  # [B, T, D], zeros right of each prompt
    prompt_mask: torch.Tensor | None = None  # bool [B, T]; None: no padding
    broken: list[str] = field(default_factory=list)  # members that were replaced, and why

    def map(self, function: Callable[[torch.Tensor], torch.Tensor]) -> "Batch":
        """The same batch with `function` applied to every tensor but σ."""
        tensors = {n: v for n, v in vars(self).items() if isinstance(v, torch.Tensor) and n != "sigma"}
        moved: dict[str, Any] = {name: function(tensor) for name, tensor in tensors.items()}
        return replace(self, **moved)

    def tensors(self) -> list[torch.Tensor]:
        return [value for value in vars(self).values() if isinstance(value, torch.Tensor)]

    def to(self, device: torch.device | str, non_blocking: bool = False) -> "Batch":
        return self.map(lambda tensor: tensor.to(device, non_blocking=non_blocking))

    def pin_memory(self, device: Any = None) -> "Batch":
        return self.map(lambda tensor: tensor.pin_memory())


def collate(
    samples: Sequence[Sample], draws: Sequence[Draws], empty_prompt: torch.Tensor | None = None, text_multiple: int = 1
) -> dict[str, Any]:
    """The fields of Batch from `keys` to `prompt_mask`; prompts are padded to a multiple of `text_multiple` tokens."""
    drop = [draw.drop_caption for draw in draws]
    batch: dict[str, Any] = {
        "keys": [sample.key for sample in samples],
        "width": samples[0].width,
        "height": samples[0].height,
        "captions": ["" if dropped else sample.caption for sample, dropped in zip(samples, drop, strict=True)],
        "noise": torch.stack([draw.noise for draw in draws]).unsqueeze(2),
        "sigma": torch.tensor([draw.sigma for draw in draws], dtype=torch.float32),
        "drop": torch.tensor(drop),
    }
    if samples[0].pixels is not None:
        return batch | {"pixels": torch.stack([s.pixels for s in samples if s.pixels is not None])}
    assert empty_prompt is not None, "encoded samples need the embedding of the empty caption"
    prompts = [empty_prompt if d else s.prompt_embeds for s, d in zip(samples, drop, strict=True)]
    embeds, mask = Prompt.from_list([prompt for prompt in prompts if prompt is not None], text_multiple)
    latents = torch.stack([s.latent for s in samples if s.latent is not None]).unsqueeze(2)
    return batch | {"latents": latents, "prompt_embeds": embeds, "prompt_mask": mask}


def make_batch(
    dataset: ShardDataset,
    place: int,
    epoch: int,
    indices: Sequence[int],
    draw: DrawSample,
    text_multiple: int = 1,
    attempts: int = ATTEMPTS,
) -> Batch:
    """The micro-batch that `Order.micro_batch(place)` gave as (epoch, indices): a pure function, in whatever process.

    A sample that can't be read gives way to the next readable one of its bucket (keeping the noise and σ that belong to
    its own index) and is named in `broken`. Raises BrokenSample after more than `attempts` of them in a row.
    """
    broken: list[str] = []
    samples = [_read_or_replace(dataset, int(index) % len(dataset), attempts, broken) for index in indices]
    width, height = samples[0].width, samples[0].height
    latent_shape = (LATENT_CHANNELS, height // VAE_FACTOR, width // VAE_FACTOR)
    draws = [draw(epoch, int(index), latent_shape) for index in indices]
    tensors = collate(samples, draws, dataset.empty_prompt, text_multiple)
    return Batch(place=place, epoch=epoch, indices=[int(index) for index in indices], broken=broken, **tensors)


def _read_or_replace(dataset: ShardDataset, index: int, attempts: int, broken: list[str]) -> Sample:
    """Sample `index`, or the first readable one after it in its bucket; appends what was broken."""
    try:
        return dataset.read(index)
    except BrokenSample as error:
        if attempts == 0:
            raise
        broken.append(str(error))
    for other in itertools.islice(dataset.same_bucket(index), attempts):
        try:
            return dataset.read(other)
        except BrokenSample as error:
            last = error
    raise BrokenSample(f"{attempts} samples after a broken one are broken too (check_shards.py lists them): {last}")
