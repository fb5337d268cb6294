"""The micro-batch with the most tokens that a run can meet, and random data of its shape."""

from typing import Any, NamedTuple

import numpy as np
import torch

from qwen_image.encoders.text_encoder import Prompt
from qwen_image.encoders.vae import PIXEL_MULTIPLE
from train.config.train_config import TrainConfig
from train.data.batch_shapes import batch_shapes
from train.data.shard_dataset import LATENT_CHANNELS, VAE_FACTOR, ShardDataset
from train.step.flow_matching_module import STORED_DTYPE

SIGMA = 0.5  # on the grid of the modulation table


class BatchShape(NamedTuple):
    """Samples, pixels of each, padded text tokens, and whether any of these are padding."""

    batch: int
    height: int
    width: int
    text: int
    padded: bool

    @property
    def tokens(self) -> int:
        """Image and text tokens of all samples."""
        return self.batch * (self.height * self.width // PIXEL_MULTIPLE**2 + self.text)


def largest_batch(config: TrainConfig, dataset: ShardDataset) -> BatchShape:
    """The micro-batch with the most tokens that this run can meet: a bucket with the longest prompt that occurs in it."""
    longest = {bucket.id: config.max_prompt_tokens for bucket in dataset.manifest.buckets}
    if dataset.encoded and len(dataset.training):
        buckets = np.asarray(dataset.index.bucket)[dataset.training]
        tokens = np.asarray(dataset.index.prompt_tokens)[dataset.training]
        longest = {int(bucket): int(tokens[buckets == bucket].max()) for bucket in np.unique(buckets)}

    padded = batch_shapes(config, dataset, config.text_multiple).padded

    def shape(bucket: Any) -> BatchShape:
        text = min(longest[bucket.id], config.max_prompt_tokens)
        text = -(-text // config.text_multiple) * config.text_multiple
        return BatchShape(config.batch_size, bucket.height, bucket.width, text, padded)

    shapes = [shape(bucket) for bucket in dataset.manifest.buckets if bucket.id in longest]
    return max(shapes, key=lambda each: (each.tokens, each))


def random_arguments(shape: BatchShape, prompt_width: int, device: torch.device) -> tuple[Any, ...]:
    """What FlowMatchingModule takes, of this shape: latents, noise, σ on the CPU, and a prompt."""
    generator = torch.Generator().manual_seed(0)
    size = (shape.batch, LATENT_CHANNELS, 1, shape.height // VAE_FACTOR, shape.width // VAE_FACTOR)
    latents, noise = (torch.randn(size, generator=generator) for _ in range(2))
    embeds = torch.randn(shape.batch, shape.text, prompt_width, generator=generator)
    mask = None
    if shape.padded:
        mask = torch.ones(shape.batch, shape.text, dtype=torch.bool)
        mask[0, -1] = False
        mask = mask.to(device)
    prompt = Prompt(embeds.to(device, STORED_DTYPE), mask)
    return latents.to(device, STORED_DTYPE), noise.to(device), torch.full((shape.batch,), SIGMA), prompt
