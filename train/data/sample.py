"""One training sample as it stands in a shard, the error for one that cannot be read, and what is known of them all."""

from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch

from data_prep.shard_format.shards import Manifest, ShardIndex


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
