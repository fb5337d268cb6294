"""One training sample as it stands in a shard, the error for one that cannot be read, and what is known of them all."""

from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import numpy as np
import safetensors.torch
import torch

from data_prep.shard_format.shards import Manifest, ShardIndex
from files.shown import shown
from qwen_image.model.sizes import LATENT_CHANNELS


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
    latent: torch.Tensor | None = None  # [16, H/8, W/8], normalized, as stored (bf16)
    prompt_embeds: torch.Tensor | None = None  # [T, D], cut to max_prompt_tokens
    pixels: torch.Tensor | None = None  # uint8 [3, H, W], RGB


def read_encoded(payload: bytes, prompt_width: int) -> tuple[torch.Tensor, torch.Tensor]:
    """latent [16, H/8, W/8] and prompt_embeds [T, D] of an encoded sample, as encode_shards.py writes them.

    Raises ValueError for other names, types or shapes than these, and for values that are not finite: bytes that mean
    something else would train all the same.
    """
    tensors = safetensors.torch.load(payload)
    if set(tensors) != {"latent", "prompt_embeds"}:
        raise ValueError(
            f"it holds {', '.join(map(shown, sorted(tensors))) or 'nothing'}, not latent and prompt_embeds"
        )
    for name, tensor in tensors.items():
        if tensor.dtype != torch.bfloat16:
            raise ValueError(f"{name} is {str(tensor.dtype).removeprefix('torch.')}, encoded shards hold bfloat16")
        if not torch.isfinite(tensor).all():
            raise ValueError(f"{name} is not finite: {int((~torch.isfinite(tensor)).sum())} of {tensor.numel()} values")
    latent, embeds = tensors["latent"], tensors["prompt_embeds"]
    if (
        latent.ndim != 3
        or latent.shape[0] != LATENT_CHANNELS
        or 0 in latent.shape
        or any(s % 2 for s in latent.shape[1:])
    ):
        raise ValueError(
            f"latent has shape {tuple(latent.shape)}, must be ({LATENT_CHANNELS}, H/8, W/8) with even sides"
        )
    if embeds.ndim != 2 or len(embeds) == 0 or embeds.shape[1] != prompt_width:
        raise ValueError(
            f"prompt_embeds has shape {tuple(embeds.shape)}, must be (T, {prompt_width}) with T at least 1"
        )
    return latent, embeds


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


class DataSet(Protocol):
    """What a run knows of its data before it reads a sample: of indexed shards (ShardDataset) or a stream (StreamedSet).

    Attributes:
        name: where it lies, as it was given, for messages.
        encoded: the shards hold latents and prompt embeddings.
        fingerprint: names this data set; a checkpoint of another one is refused.
        empty_prompt: [5, D] embedding of the empty caption for caption dropout; None for image shards.
        index: each sample's place, bucket and lengths; None for a stream, of which nothing is known but the buckets.
        training: int64 indices of the samples that are not held out; none for a stream.
    """

    name: str
    manifest: Manifest
    encoded: bool
    empty_prompt: torch.Tensor | None
    training: np.ndarray

    @property
    def fingerprint(self) -> str: ...

    @property
    def index(self) -> ShardIndex | None: ...
