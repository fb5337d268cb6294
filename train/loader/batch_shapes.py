"""Which shapes the micro-batches of a run can have: the more there are, the less it pays to prepare for each.

A CUDA graph serves one shape only (train/step/cuda_graphs.py). A bucket's pictures are all of one size, so it is the text that
multiplies shapes: ten buckets and captions of up to 512 tokens, padded to multiples of 32, are 160.
"""

from typing import Any, NamedTuple

import numpy as np
import torch

from qwen_image.encoders.text_encoder import text_tokens_of
from qwen_image.model.conditioning import Prompt
from qwen_image.model.family import TEXT_TO_IMAGE, Member
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
    added_characters: int = 0  # that --caption_prefix and its like may put around a caption that isn't encoded
    member: Member = TEXT_TO_IMAGE  # for pairs that aren't encoded: it tells how many tokens their pictures are


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
    pictures, told = token_counts(options, dataset)
    tokens = pictures + told.clip(1, longest)
    if dataset.encoded and (variants := index.variant_tokens[dataset.training]).shape[1]:  # each of them may be drawn
        each, there = variants.shape[1], (variants > 0).ravel()
        bucket, pictures = (np.repeat(values, each)[there] for values in (bucket, pictures))
        tokens = pictures + (variants.ravel()[there] - pictures).clip(1, longest)
    if options.caption_dropout > 0:
        empty = 1 if dataset.empty_prompt is None else len(dataset.empty_prompt)
        bucket, pictures = np.concatenate([bucket, bucket]), np.concatenate([pictures, pictures])
        tokens = np.concatenate([tokens, pictures[len(tokens) :] + empty])
    steps = -(-tokens // text_padding)
    base = int(tokens.max(initial=0)) + 1
    shapes = len(np.unique(bucket * base + steps))
    lengths = len(np.unique(bucket * base + tokens))
    mixed = options.batch_size > 1 and lengths > len(np.unique(bucket))  # a batch then holds prompts of several lengths
    padded = mixed or bool((tokens % text_padding).any())
    return BatchShapes(shapes, padded if dataset.encoded else maybe_padded)


def token_counts(options: BatchOptions, dataset: DataSet) -> tuple[np.ndarray, np.ndarray]:
    """Of each training sample the tokens of its pictures and those of its caption, int64; estimated where not encoded yet."""
    index = dataset.index
    assert index is not None
    if dataset.encoded:
        pictures = np.asarray(index.picture_tokens)[dataset.training].astype(np.int64)
        return pictures, np.asarray(index.prompt_tokens)[dataset.training].astype(np.int64) - pictures
    longest = np.maximum(index.caption_length, index.longest_caption)[dataset.training].astype(np.int64)
    told = (longest + options.added_characters) // CHARACTERS_A_TOKEN
    of_bucket = {bucket.id: text_tokens_of(options.member, bucket.sources) for bucket in dataset.manifest.buckets}
    buckets = np.asarray(index.bucket)[dataset.training]
    return np.array([of_bucket[int(bucket)] for bucket in buckets], dtype=np.int64), told


def choose_text_padding(options: BatchOptions, dataset: DataSet, device: torch.device) -> int:
    """`--text_padding` where the user left it open: on a GPU the least that leaves few enough shapes, else 1."""
    if device.type != "cuda":
        return 1
    few = (padding for padding in TEXT_PADDINGS if batch_shapes(options, dataset, padding).shapes <= KEPT)
    return next(few, TEXT_PADDINGS[0])  # too many whatever we do: then without graphs, and with little padding


KEPT = 96  # shapes; the one that was not met for longest makes room


SIGMA = 0.5  # on the grid of the modulation table


class BatchShape(NamedTuple):
    """Samples, pixels of each, padded text tokens, whether any of these are padding, and width and height of source images."""

    batch: int
    height: int
    width: int
    text: int
    padded: bool
    sources: tuple[tuple[int, int], ...] = ()

    @property
    def tokens(self) -> int:
        """Image tokens, those of source images included, and text tokens of all samples."""
        pixels = self.height * self.width + sum(width * height for width, height in self.sources)
        return self.batch * (pixels // PIXEL_MULTIPLE**2 + self.text)


def largest_batch(options: BatchOptions, dataset: DataSet, text_padding: int) -> BatchShape:
    """The micro-batch with the most tokens that this run can meet: a bucket with the longest prompt that occurs in it."""
    longest = {
        bucket.id: options.max_prompt_tokens + text_tokens_of(options.member, bucket.sources)
        for bucket in dataset.manifest.buckets
    }
    if dataset.encoded and dataset.index is not None:
        buckets = np.asarray(dataset.index.bucket)[dataset.training]
        pictures, told = token_counts(options, dataset)
        tokens = pictures + told.clip(max=options.max_prompt_tokens)
        longest = {int(bucket): int(tokens[buckets == bucket].max()) for bucket in np.unique(buckets)}

    padded = batch_shapes(options, dataset, text_padding).padded

    def shape(bucket: Any) -> BatchShape:
        text = -(-longest[bucket.id] // text_padding) * text_padding
        return BatchShape(options.batch_size, bucket.height, bucket.width, text, padded, tuple(bucket.sources))

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
    sources = tuple(
        torch.randn(shape.batch, LATENT_CHANNELS, 1, h // VAE_FACTOR, w // VAE_FACTOR, generator=generator)
        for w, h in shape.sources
    )
    prompt = Prompt(embeds.to(device, STORED_DTYPE), mask, tuple(each.to(device, STORED_DTYPE) for each in sources))
    return latents.to(device, STORED_DTYPE), noise.to(device), torch.full((shape.batch,), SIGMA), prompt
