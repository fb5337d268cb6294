"""Which shapes the micro-batches of a run can have: the more there are, the less it pays to prepare for each.

A CUDA graph serves one shape only (train/step/cuda_graphs.py). A bucket's pictures are all of one size, so it is the text that
multiplies shapes: ten buckets and captions of up to 512 tokens, padded to multiples of 32, are 160.
"""

from typing import NamedTuple

import numpy as np
import torch

from train.config.train_config import TrainConfig
from train.data.shard_dataset import ShardDataset
from train.step.cuda_graphs import KEPT

TEXT_PADDINGS = (32, 64, 128)  # tokens; at 128, the mean batch of 4,200 tokens carries 1.5 % padding
CHARACTERS_A_TOKEN = 4  # of English captions; only where nobody has counted tokens


class BatchShapes(NamedTuple):
    """How many shapes there are at the most, and whether any batch has padding."""

    shapes: int
    padded: bool


def batch_shapes(config: TrainConfig, dataset: ShardDataset, multiple: int) -> BatchShapes:
    """Shapes when prompts are padded to a multiple of `multiple` tokens; estimated where the prompts aren't encoded yet."""
    longest, maybe_padded = config.max_prompt_tokens, config.batch_size > 1 or multiple > 1
    if not len(dataset.training):  # a stream, about which nothing is known
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


def text_padding(config: TrainConfig, dataset: ShardDataset, device: torch.device) -> int:
    """What `text_padding` is where the user left it open: on a GPU the least that leaves few enough shapes, else 1."""
    if device.type != "cuda":
        return 1
    few = (multiple for multiple in TEXT_PADDINGS if batch_shapes(config, dataset, multiple).shapes <= KEPT)
    return next(few, TEXT_PADDINGS[0])  # too many whatever we do: then without graphs, and with little padding
