"""The full-size transformer with random weights, made where it is used: nothing is read from a disk."""

import zlib
from collections.abc import Iterator
from concurrent.futures import Future
from contextlib import contextmanager
from typing import Any
from unittest.mock import patch

import torch

from qwen_image.loading import staged as staged_loading
from qwen_image.loading.safetensors_ranges import RangeReader
from qwen_image.model.sizes import TransformerConfig
from qwen_image.model.transformer import QwenImageTransformer


def random_transformer(
    layers: int, device: torch.device, dtype: torch.dtype, zero_cond_t: bool = False
) -> QwenImageTransformer:
    """The full-size shape with so many blocks, weights N(0, 0.02), built on the device."""
    with torch.device("meta"):
        transformer = QwenImageTransformer(TransformerConfig(num_layers=layers, zero_cond_t=zero_cond_t)).to(dtype)
    transformer.to_empty(device=device)
    for name, parameter in transformer.named_parameters():
        fill(name, parameter.data)
        parameter.requires_grad_(False)
    return transformer.eval()


def fill(name: str, values: torch.Tensor) -> None:
    """Random values for the parameter `name`: matrices and biases N(0, 0.02), the scales of norms 1."""
    values.normal_(0, 0.02) if values.ndim > 1 or "bias" in name else values.fill_(1.0)


@contextmanager
def drawn_instead_of_read() -> Iterator[None]:
    """Inside, `load_staged` does all that it does, but draws each tensor where it belongs instead of reading its bytes.

    With a hollow model (demo/random_model.py) a start of the trainer then takes seconds less and no disk. Zeros would not
    do: a GPU that multiplies them draws less power and so runs faster.
    """

    class Unread(RangeReader):
        def read(self, stored: Any, destination: torch.Tensor, first: int = 0) -> list[Future[None]]:
            return []

    add = staged_loading.Stage.add

    def draw(stage: staged_loading.Stage, name: str, values: torch.Tensor, arriving: list[Future[None]]) -> None:
        torch.manual_seed(zlib.crc32(name.encode()))  # the same weights whichever rank draws them, in whichever order
        fill(name, values)
        add(stage, name, values, arriving)

    with patch.object(staged_loading, "RangeReader", Unread), patch.object(staged_loading.Stage, "add", draw):
        yield
