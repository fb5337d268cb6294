"""Which shapes the micro-batches of a run can have: the more there are, the less it pays to prepare for each.

A CUDA graph serves one shape only (train/step/cuda_graphs.py). A bucket's pictures are all of one size, so it is the text that
multiplies shapes: ten buckets and captions of up to 512 tokens, padded to multiples of 32, are 160.
"""

from typing import Any, NamedTuple

import numpy as np
import torch

from qwen_image.model.prompt import Prompt
from qwen_image.model.sizes import LATENT_CHANNELS, PIXEL_MULTIPLE, VAE_FACTOR
from train.config.train_config import TrainConfig
from train.data.batch import STORED_DTYPE
from train.data.sample import DataSet

TEXT_PADDINGS = (32, 64, 128)  # tokens; at 128, the mean batch of 4,200 tokens carries 1.5 % padding
CHARACTERS_A_TOKEN = 4  # of English captions; only where nobody has counted tokens


class BatchShapes(NamedTuple):
    """How many shapes there are at the most, and whether any batch has padding."""

    shapes: int
    padded: bool


def batch_shapes(config: TrainConfig, dataset: DataSet, multiple: int) -> BatchShapes:
    """Shapes when prompts are padded to a multiple of `multiple` tokens; estimated where the prompts aren't encoded yet."""
    longest, maybe_padded = config.max_prompt_tokens, config.batch_size > 1 or multiple > 1
    if dataset.index is None:
        return BatchShapes(len(dataset.manifest.buckets) * -(-longest // multiple), maybe_padded)
    index = dataset.index
    bucket = np.asarray(index.bucket)[dataset.training].astype(np.int64)
    if dataset.encoded:
        tokens = np.asarray(index.prompt_tokens)[dataset.training]
    else:
        tokens = np.asarray(index.caption_length)[dataset.training] // CHARACTERS_A_TOKEN
    tokens = tokens.clip(1, longest).astype(np.int64)
    if config.caption_dropout > 0:
        empty = 1 if dataset.empty_prompt is None else len(dataset.empty_prompt)
        ids = np.unique(bucket)
        bucket = np.concatenate([bucket, ids])
        tokens = np.concatenate([tokens, np.full(len(ids), empty)])
    steps = -(-tokens // multiple)
    shapes = len(np.unique(bucket * (longest + 1) + steps))
    lengths = len(np.unique(bucket * (longest + 1) + tokens))
    mixed = config.batch_size > 1 and lengths > len(np.unique(bucket))  # a batch then holds prompts of several lengths
    padded = mixed or bool((tokens % multiple).any())
    return BatchShapes(shapes, padded if dataset.encoded else maybe_padded)


def text_padding(config: TrainConfig, dataset: DataSet, device: torch.device) -> int:
    """What `text_padding` is where the user left it open: on a GPU the least that leaves few enough shapes, else 1."""
    if device.type != "cuda":
        return 1
    few = (multiple for multiple in TEXT_PADDINGS if batch_shapes(config, dataset, multiple).shapes <= KEPT)
    return next(few, TEXT_PADDINGS[0])  # too many whatever we do: then without graphs, and with little padding


KEPT = 96  # shapes; the one that was not met for longest makes room


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


def largest_batch(config: TrainConfig, dataset: DataSet) -> BatchShape:
    """The micro-batch with the most tokens that this run can meet: a bucket with the longest prompt that occurs in it."""
    longest = {bucket.id: config.max_prompt_tokens for bucket in dataset.manifest.buckets}
    if dataset.encoded and dataset.index is not None:
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
