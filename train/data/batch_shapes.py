"""Which shapes the micro-batches of a run can have: the more there are, the less it pays to prepare for each.

A CUDA graph serves one shape only (train/step/cuda_graphs.py). A bucket's pictures are all of one size, so it is the text that
multiplies shapes: ten buckets and captions of up to 512 tokens, padded to multiples of 32, are 160.
"""

from typing import Any, NamedTuple

import numpy as np
import torch

from qwen_image.model.conditioning import Prompt
from qwen_image.model.sizes import LATENT_CHANNELS, PIXEL_MULTIPLE, VAE_FACTOR
from train.data.batch import STORED_DTYPE
from train.data.sample import DataSet

TEXT_PADDINGS = (32, 64, 128)  # tokens; at 128, the mean batch of 4,200 tokens carries 1.5 % padding
CHARACTERS_A_TOKEN = 4  # of English captions; only where nobody has counted tokens


class BatchOptions(NamedTuple):
    """What decides a micro-batch's shape besides the samples in it: how many they are, and how long their text may be."""

    batch_size: int = 1
    max_prompt_tokens: int = 512
    caption_dropout: float = 0.0  # the empty caption has a length of its own


class BatchShapes(NamedTuple):
    """How many shapes there are at the most, and whether any batch has padding."""

    shapes: int
    padded: bool


def batch_shapes(options: BatchOptions, dataset: DataSet, text_padding: int) -> BatchShapes:
    """Shapes when prompts are padded to a multiple of so many tokens; estimated where the prompts aren't encoded yet."""
    longest, maybe_padded = options.max_prompt_tokens, options.batch_size > 1 or text_padding > 1
    if dataset.index is None:  # a stream, about which nothing is known
        return BatchShapes(len(dataset.manifest.buckets) * -(-longest // text_padding), maybe_padded)
    index = dataset.index
    bucket = np.asarray(index.bucket)[dataset.training].astype(np.int64)
    if dataset.encoded:
        tokens = np.asarray(index.prompt_tokens)[dataset.training]
    else:
        tokens = np.asarray(index.caption_length)[dataset.training] // CHARACTERS_A_TOKEN
    tokens = tokens.clip(1, longest).astype(np.int64)
    if options.caption_dropout > 0:
        empty = 1 if dataset.empty_prompt is None else len(dataset.empty_prompt)
        ids = np.unique(bucket)
        bucket = np.concatenate([bucket, ids])
        tokens = np.concatenate([tokens, np.full(len(ids), empty)])
    steps = -(-tokens // text_padding)
    shapes = len(np.unique(bucket * (longest + 1) + steps))
    lengths = len(np.unique(bucket * (longest + 1) + tokens))
    mixed = options.batch_size > 1 and lengths > len(np.unique(bucket))  # a batch then holds prompts of several lengths
    padded = mixed or bool((tokens % text_padding).any())
    return BatchShapes(shapes, padded if dataset.encoded else maybe_padded)


def choose_text_padding(options: BatchOptions, dataset: DataSet, device: torch.device) -> int:
    """`--text_padding` where the user left it open: on a GPU the least that leaves few enough shapes, else 1."""
    if device.type != "cuda":
        return 1
    few = (padding for padding in TEXT_PADDINGS if batch_shapes(options, dataset, padding).shapes <= KEPT)
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


def largest_batch(options: BatchOptions, dataset: DataSet, text_padding: int) -> BatchShape:
    """The micro-batch with the most tokens that this run can meet: a bucket with the longest prompt that occurs in it."""
    longest = {bucket.id: options.max_prompt_tokens for bucket in dataset.manifest.buckets}
    if dataset.encoded and dataset.index is not None:
        buckets = np.asarray(dataset.index.bucket)[dataset.training]
        tokens = np.asarray(dataset.index.prompt_tokens)[dataset.training]
        longest = {int(bucket): int(tokens[buckets == bucket].max()) for bucket in np.unique(buckets)}

    padded = batch_shapes(options, dataset, text_padding).padded

    def shape(bucket: Any) -> BatchShape:
        text = min(longest[bucket.id], options.max_prompt_tokens)
        text = -(-text // text_padding) * text_padding
        return BatchShape(options.batch_size, bucket.height, bucket.width, text, padded)

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
