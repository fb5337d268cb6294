"""What the peers share: the size of the model and of the work, random weights, and memory given back at the end."""

from __future__ import annotations

import contextlib
import gc
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass
from importlib.metadata import version
from typing import TYPE_CHECKING, Any

from qwen_image.model.sizes import LATENT_CHANNELS, VAE_FACTOR, check_image_size

if TYPE_CHECKING:
    import torch
    from accelerate import Accelerator

LORA_TARGETS = ("to_q", "to_k", "to_v", "add_q_proj", "add_k_proj", "add_v_proj")
LORA_RANK = 32
LEARNING_RATE = 1e-4  # both scripts' value
TIMESTEP_CHANNELS = 256  # sinusoids of the timestep, fixed in both libraries


@dataclass(frozen=True)
class Shape:
    """The transformer's size; the defaults are Qwen-Image's (20.4 B parameters)."""

    layers: int = 60
    heads: int = 24
    head_dim: int = 128
    joint_dim: int = 3584

    @property
    def width(self) -> int:
        return self.heads * self.head_dim

    @property
    def rope_axes(self) -> tuple[int, int, int]:
        """Channels of a head for frame, row and column: 1/8, 7/16, 7/16 as in Qwen-Image (16, 56, 56 of 128)."""
        return (self.head_dim // 8, self.head_dim * 7 // 16, self.head_dim * 7 // 16)


TINY = Shape(layers=2, heads=4, head_dim=32, joint_dim=64)


@dataclass(frozen=True)
class Work:
    """What a step trains on; pixels must be divisible by 16 (latents by 8, patches of 2). No padding in the text."""

    height: int
    width: int
    batch: int = 1
    text_tokens: int = 128

    def __post_init__(self) -> None:
        check_image_size(self.height, self.width)
        if min(self.batch, self.text_tokens) < 1:
            raise ValueError(f"batch and text_tokens must be positive: {self}")

    @property
    def latent_shape(self) -> tuple[int, int, int, int]:
        return (self.batch, LATENT_CHANNELS, self.height // VAE_FACTOR, self.width // VAE_FACTOR)


@dataclass
class Peer:
    """`step()` does forward, backward, optimizer step and zero_grad, and returns the loss (float32 scalar, detached)."""

    step: Callable[[], torch.Tensor]
    parameters: list[torch.nn.Parameter]  # of the whole model, frozen ones too
    versions: dict[str, str]

    @property
    def trainable(self) -> list[torch.nn.Parameter]:
        return [parameter for parameter in self.parameters if parameter.requires_grad]


Builder = Callable[[Shape, Work, "torch.device | str"], AbstractContextManager[Peer]]


def random_weights(model: torch.nn.Module, device: torch.device) -> torch.nn.Module:
    """Turn a model on "meta" into bfloat16 on `device`: norms 1, everything else N(0, 0.02). No copy on the CPU."""
    import torch

    torch.nn.Module.to(model, torch.bfloat16).to_empty(device=device)  # not diffusers' own to(), which warns
    generator = torch.Generator(device).manual_seed(0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" in name and parameter.ndim == 1 and name.endswith("weight"):
                parameter.fill_(1.0)
            else:
                parameter.normal_(0, 0.02, generator=generator)
    return model


def cached_sample(work: Work, shape: Shape, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """Random latents [B, 16, H/8, W/8] and prompt embeddings [B, T, joint_dim], bfloat16, the same for every peer."""
    import torch

    generator = torch.Generator(device).manual_seed(1)
    options: dict[str, Any] = {"generator": generator, "device": device, "dtype": torch.bfloat16}
    latents = torch.randn(work.latent_shape, **options)
    return latents, torch.randn(work.batch, work.text_tokens, shape.joint_dim, **options)


@contextlib.contextmanager
def fresh_accelerator(device: torch.device, mixed_precision: str) -> Iterator[Accelerator]:
    """accelerate keeps its precision in process-wide state, so that state is dropped before and after."""
    from accelerate import Accelerator
    from accelerate.state import AcceleratorState

    AcceleratorState._reset_state(reset_partial_state=True)
    accelerator = Accelerator(mixed_precision=mixed_precision, cpu=device.type == "cpu")
    try:
        yield accelerator
    finally:
        accelerator.free_memory()
        AcceleratorState._reset_state(reset_partial_state=True)


def lend(
    step: Callable[[], torch.Tensor], model: torch.nn.Module, optimizer: Any, packages: tuple[str, ...]
) -> Iterator[Peer]:
    """Yield the peer, then free its memory even if the caller still holds `step`."""
    import torch

    peer = Peer(step, list(model.parameters()), {package: version(package) for package in packages})
    try:
        yield peer
    finally:
        optimizer.state.clear()
        for parameter in peer.parameters:
            parameter.grad = None
            parameter.data = torch.empty(0, dtype=parameter.dtype, device=parameter.device)
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
