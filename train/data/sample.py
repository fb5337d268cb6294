"""One training sample as it stands in a shard, the error for one that cannot be read, and what is known of them all."""

from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import NamedTuple, Protocol

import numpy as np
import safetensors.torch
import torch

from data_prep.images.stored_pixels import decode_mask, latent_mask
from data_prep.shard_format.shards import Manifest, ShardIndex, StoredVariant
from files.shown import shown
from qwen_image.model.sizes import LATENT_CHANNELS, VAE_FACTOR


class BrokenSample(ValueError):
    """A sample that can't be read; the message names it and says why."""


@dataclass(frozen=True)
class Sample:
    """One sample as it stands in the shard: encoded (`latent`, `prompt_embeds`) or an image (`pixels`).

    A pair has source images besides: latents or pixels, as the target is.
    """

    index: int
    key: str
    width: int  # pixels
    height: int
    caption: str
    latent: torch.Tensor | None = None  # [16, H/8, W/8], normalized, as stored (bf16)
    prompt_embeds: torch.Tensor | None = None  # [T, D], cut to max_prompt_tokens
    pixels: torch.Tensor | None = None  # uint8 [3, H, W], RGB
    sources: tuple[torch.Tensor, ...] = ()  # of a pair, each [16, h, w] or uint8 [3, h, w]
    source_sizes: tuple[tuple[int, int], ...] = ()  # their widths and heights before they were packed; for images
    empty_prompt: torch.Tensor | None = None  # [T, D]: that of the empty caption with the sources, if it was encoded
    # Of a stream, where it is drawn with the batch which of them is trained: an image's captions; an encoded sample's variants,
    # with the member of each but the first
    captions: tuple[str, ...] = ()
    variants: tuple[tuple[StoredVariant, bytes], ...] = ()
    prior: bool = False  # of the prior set
    loss_weight: float = 1.0
    mask: torch.Tensor | None = (
        None  # uint8 [H/8, W/8], 255: learn; of all samples of a run with masked loss, else of none
    )


class Encoded(NamedTuple):
    """The tensors of an encoded sample, as encode_shards.py writes them."""

    latent: torch.Tensor  # [16, H/8, W/8]
    prompt_embeds: torch.Tensor  # [T, D]
    picture_tokens: int = 0  # so many of T are source images', and stand first
    sources: tuple[torch.Tensor, ...] = ()  # [16, h, w] each
    empty_prompt: torch.Tensor | None = None  # [T, D] of the empty caption with the source images
    mask: torch.Tensor | None = None  # uint8 [H/8, W/8]

    def cut(self, max_prompt_tokens: int) -> "Encoded":
        """With at most so many tokens of the caption, the pictures' not counted."""
        return self._replace(prompt_embeds=self.prompt_embeds[: self.picture_tokens + max_prompt_tokens])


def read_encoded(payload: bytes, prompt_width: int) -> Encoded:
    """The tensors of an encoded sample.

    Raises ValueError for other names, types or shapes than these, and for values that are not finite: bytes that mean
    something else would train all the same.
    """
    tensors = safetensors.torch.load(payload)
    mask = tensors.pop("mask", None)
    tensors.pop("latent_std", None)  # encode_shards.py --latent_std: for other programs, training takes the mode
    names = [f"source_latent_{number + 1}" for number in range(sum(n.startswith("source_latent") for n in tensors))]
    wanted = {"latent", "prompt_embeds", *names, *(["picture_tokens"] if names else [])}
    if set(tensors) - ({"empty_prompt_embeds"} if names else set()) != wanted:
        raise ValueError(
            f"it holds {', '.join(map(shown, sorted(tensors))) or 'nothing'}, not latent and prompt_embeds"
        )
    pictures = tensors.pop("picture_tokens", torch.zeros(1, dtype=torch.int32))
    for name, tensor in tensors.items():
        if tensor.dtype != torch.bfloat16:
            raise ValueError(f"{name} is {str(tensor.dtype).removeprefix('torch.')}, encoded shards hold bfloat16")
        if not torch.isfinite(tensor).all():
            raise ValueError(f"{name} is not finite: {int((~torch.isfinite(tensor)).sum())} of {tensor.numel()} values")
    for name in ("latent", *names):
        shape = tuple(tensors[name].shape)
        if len(shape) != 3 or shape[0] != LATENT_CHANNELS or 0 in shape or any(side % 2 for side in shape[1:]):
            raise ValueError(f"{name} has shape {shape}, must be ({LATENT_CHANNELS}, H/8, W/8) with even sides")
    for name in ("prompt_embeds", *({"empty_prompt_embeds"} & set(tensors))):
        embeds = tensors[name]
        if embeds.ndim != 2 or len(embeds) == 0 or embeds.shape[1] != prompt_width:
            raise ValueError(f"{name} has shape {tuple(embeds.shape)}, must be (T, {prompt_width}) with T at least 1")
    if mask is not None and (mask.dtype != torch.uint8 or mask.shape != tensors["latent"].shape[1:]):
        kind = f"{str(mask.dtype).removeprefix('torch.')} {tuple(mask.shape)}"
        raise ValueError(f"mask is {kind}, must be uint8 {tuple(tensors['latent'].shape[1:])}")
    embeds = tensors["prompt_embeds"]
    if pictures.shape != (1,) or pictures.dtype != torch.int32 or not bool(names) <= int(pictures) < len(embeds):
        raise ValueError(f"picture_tokens says {pictures.tolist()} of {len(embeds)} tokens")
    sources = tuple(tensors[name] for name in names)
    return Encoded(tensors["latent"], embeds, int(pictures), sources, tensors.get("empty_prompt_embeds"), mask)


def read_variant(payload: bytes, prompt_width: int, tokens: int) -> torch.Tensor:
    """[T, D] of another form of a sample's caption. Raises ValueError for another type or shape, and for what isn't finite."""
    tensors = safetensors.torch.load(payload)
    if set(tensors) != {"prompt_embeds"}:
        raise ValueError(f"a variant holds {', '.join(map(shown, sorted(tensors))) or 'nothing'}, not prompt_embeds")
    embeds = tensors["prompt_embeds"]
    if tuple(embeds.shape) != (tokens, prompt_width) or embeds.dtype != torch.bfloat16:
        kind = str(embeds.dtype).removeprefix("torch.")
        raise ValueError(f"a variant is {kind} {tuple(embeds.shape)}, must be bfloat16 ({tokens}, {prompt_width})")
    if not torch.isfinite(embeds).all():
        raise ValueError("a variant is not finite")
    return embeds


def draw_variant(variants: list[StoredVariant], chance: Random) -> int:
    """Which of a sample's variants is trained: each as often as it is the outcome of a draw."""
    draw = int(chance.random() * sum(len(variant.draws) for variant in variants))
    return next(number for number, variant in enumerate(variants) if draw in variant.draws)


def read_empty_prompt(path: Path) -> torch.Tensor:
    """The embedding [T, D] of the empty caption. Raises FileNotFoundError, and ValueError for a damaged one."""
    again = "run encode_shards.py again, or copy it back"
    if not path.is_file():
        raise FileNotFoundError(f"{shown(path)} is missing (caption dropout needs it): {again}")
    try:
        embeds = safetensors.torch.load_file(path)["prompt_embeds"]
    except Exception as error:  # safetensors has errors of its own
        raise ValueError(f"{shown(path)} is damaged ({type(error).__name__}: {shown(error)}): {again}") from None
    if embeds.ndim != 2 or 0 in embeds.shape or embeds.dtype != torch.bfloat16 or not torch.isfinite(embeds).all():
        what = f"{tuple(embeds.shape)}, {str(embeds.dtype).removeprefix('torch.')}"
        raise ValueError(
            f"{shown(path)} is damaged: prompt_embeds ({what}) must be (T, D), bfloat16 and finite; {again}"
        )
    return embeds


def read_mask(data: bytes, width: int, height: int) -> torch.Tensor:
    """uint8 [H/8, W/8] of a shard's mask member, as encoding stores it. Raises ValueError."""
    return torch.from_numpy(latent_mask(decode_mask(data, width, height)))


def white_mask(width: int, height: int) -> torch.Tensor:
    """Of a sample that has none: all of it counts."""
    return torch.full((height // VAE_FACTOR, width // VAE_FACTOR), 255, dtype=torch.uint8)


class DataSet(Protocol):
    """What a run knows of its data before it reads a sample: of indexed shards (ShardDataset) or a stream (StreamedSet).

    Attributes:
        name: where it lies, as it was given, for messages.
        encoded: the shards hold latents and prompt embeddings.
        fingerprint: names this data set; a checkpoint of another one is refused.
        empty_prompt: [5, D] embedding of the empty caption for caption dropout; None for image shards and for pairs, whose
            samples have their own.
        index: each sample's place, bucket and lengths; None for a stream, of which nothing is known but the buckets.
        training: int64 indices of the samples that are not held out; none for a stream.
        masked: how many samples have a mask; of a stream as far as its manifest, or its first samples, tell.
        paired: the samples are pairs, of a target and its source images.
        prompt_width: D of an encoded set's embeddings.
    """

    name: str
    manifest: Manifest
    encoded: bool
    empty_prompt: torch.Tensor | None
    training: np.ndarray
    paired: bool
    masked: int
    prompt_width: int

    @property
    def fingerprint(self) -> str: ...

    @property
    def index(self) -> ShardIndex | None: ...
