"""Making images on any card: where the transformer, the text encoder and the VAE lie, decided before weights are read.

    plan = SamplingPlan.of(files, work, device)
    transformer = plan.load_transformer(files, schedule, device)

The same choice as training's (base_choice.py): the exact base where it fits, else the fastest of 8 bits and of blocks that come
from host memory. The text encoder is not there at the same time as the transformer, so either may fill the card; where it
doesn't fit, its layers come from host memory. The VAE falls back to tiles by itself (qwen_image/encoders/vae.py).
"""

import gc
import hashlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, cast

import torch

from qwen_image.encoders.encoder_room import PICTURE_TOKENS, TILE_BYTES, streaming_line
from qwen_image.encoders.source_images import SourceImage, read_source
from qwen_image.encoders.text_encoder import MAX_TOKENS, PicturePrompt, TextEncoder
from qwen_image.float8.linear import check_float8
from qwen_image.free_memory import CONTEXT_BYTES, GIB, device_bytes
from qwen_image.loading.model_files import ModelFiles, ModelSource
from qwen_image.loading.safetensors_ranges import read_headers
from qwen_image.loading.weights import empty_transformer, match_weights
from qwen_image.model.conditioning import Prompt
from qwen_image.model.modulation import modulation_layers
from qwen_image.model.sizes import PIXEL_MULTIPLE
from qwen_image.model.transformer import QwenImageTransformer
from qwen_image.noise_schedule import SigmaSchedule
from qwen_image.pipeline import DEFAULT_MAX_TOKENS, check_prompt_width
from qwen_image.streaming.stream_blocks import load_streamed
from train.base_model.base_home import BaseHome
from train.base_model.base_plan import BasePlan
from train.config.sample_prompts import SamplePrompt, Told
from train.config.zero_plan import ZeroPlan
from train.fit.activation_checkpointing import MARGIN_SHARE
from train.fit.base_choice import fastest_base, fits
from train.fit.memory_plan import Machine, Setup, plan_memory
from train.lora.lora_file import LoraFile

# Of Setup's bytes a trained parameter (weight, gradient, AdamW), what a loaded one takes.
TRAINED_BYTES, LOADED_BYTES = 18, 2

Precision = Literal["auto", "dtype", "float8", "int8"]


@dataclass(frozen=True)
class ImageWork:
    """What is to be made, and what of the way was left open or asked for.

    Attributes:
        height, width: of the largest image; schedules: every (steps, image tokens) that occurs.
        adapted: the layers of the LoRAs, with how many parameters the largest has; dora: some of them are DoRA.
        resident_blocks: None leaves it open.
        source_tokens: of the most source images together, their latents' and those that they are in the prompt.
    """

    height: int
    width: int
    schedules: tuple[tuple[int, int], ...]
    dtype: torch.dtype
    adapted: tuple[str, ...] = ()
    lora_parameters: int = 0
    dora: bool = False
    precision: Precision = "auto"
    resident_blocks: int | None = None
    source_tokens: int = 0

    @classmethod
    def of(
        cls, jobs: Sequence[SamplePrompt], dtype: torch.dtype, precision: Precision, resident_blocks: int | None
    ) -> "ImageWork":
        """Of images of any sizes, one at a time; more at once are halved where they run out of memory."""
        largest = max(jobs, key=lambda job: job.height * job.width)
        schedules = dict.fromkeys((job.num_inference_steps, image_tokens(job.height, job.width)) for job in jobs)
        own: dict[str, Any] = {"precision": precision, "resident_blocks": resident_blocks}
        sources = max(len(job.source_image) * job.source_pixels // PIXEL_MULTIPLE**2 for job in jobs)
        own["source_tokens"] = sources + (PICTURE_TOKENS if sources else 0)
        return cls(largest.height, largest.width, tuple(schedules), dtype, **own)

    def wearing(self, lora: LoraFile) -> "ImageWork":
        """With this LoRA as well, at its time."""
        parameters = sum(tensor.numel() for layer in lora.layers.values() for tensor in layer.values())
        return replace(
            self,
            adapted=tuple(dict.fromkeys((*self.adapted, *lora.layers))),
            lora_parameters=max(self.lora_parameters, parameters),
            dora=self.dora or lora.is_dora,
        )

    @property
    def tokens(self) -> int:
        """Of the image, the longest prompt and the source images."""
        return image_tokens(self.height, self.width) + MAX_TOKENS + self.source_tokens


class KnownPrompts:
    """Embeddings by their prompt and its source images, which can be asked for as a text encoder is."""

    def __init__(self, encoder: TextEncoder, asked: Iterable[Told]) -> None:
        self.embeds: dict[str, torch.Tensor] = {}
        self.with_pictures: dict[tuple[bytes | str, ...], PicturePrompt] = {}
        for told in asked:
            if told.source_image:
                sources = [read_source(Path(name).expanduser(), told.source_pixels) for name in told.source_image]
                self.with_pictures[identity(told.text, sources)] = encoder.encode_pictures(told.text, sources)
            else:
                self.embeds[told.text] = encoder.encode_list([told.text], DEFAULT_MAX_TOKENS)[0]

    def encode(self, captions: list[str], max_tokens: int) -> Prompt:
        return Prompt.from_list([self.embeds[caption] for caption in captions])

    def encode_pictures(self, instruction: str, sources: Sequence[SourceImage]) -> PicturePrompt:
        return self.with_pictures[identity(instruction, sources)]


def identity(instruction: str, sources: Sequence[SourceImage]) -> tuple[bytes | str, ...]:
    return instruction, *(hashlib.sha256(source.pixels.tobytes()).digest() for source in sources)


def image_tokens(height: int, width: int) -> int:
    return (height // PIXEL_MULTIPLE) * (width // PIXEL_MULTIPLE)


@dataclass(frozen=True)
class SamplingPlan:
    """Where everything lies; `lines` tell what was decided because of the card."""

    base: BasePlan
    work: ImageWork
    streams_text_encoder: bool
    lines: tuple[str, ...]

    @classmethod
    def of(cls, files: ModelFiles, work: ImageWork, device: torch.device) -> "SamplingPlan":
        """Raises ValueError for what can't go together or fits in no way, before weights are read."""
        empty = empty_transformer(files)
        match_weights(empty, files["transformer"].weights)
        machine, setup = free_machine(device), setup_of(empty, work)
        vae = sum(stored.numel for stored in read_headers(files["vae"].weights).values()) * work.dtype.itemsize
        own = machine
        if machine.device_total is not None:
            own = machine._replace(device_total=machine.device_total - vae - TILE_BYTES)
        chosen = fastest_base(setup, own)
        lines = list(check_float8(device, work.dtype)) if chosen.base.float8 else []
        refuse_what_does_not_fit(chosen, own, work)
        if chosen is not setup:
            lines.append(base_line(setup, chosen, own, vae + TILE_BYTES))
        elif (streamed := chosen.base.home.line(chosen.base.blocks)) is not None:
            lines.append(streamed)
        streaming = streaming_line(files["text_encoder"], work.dtype, MAX_TOKENS, device, member=files.member)
        if streaming is not None:
            lines.append(streaming)
        return cls(chosen.base, work, streaming is not None, tuple(lines))

    def encode(self, files: ModelFiles, asked: Iterable[Told], device: torch.device) -> TextEncoder:
        """The prompts' embeddings, in the place of the text encoder, which is there for that alone."""
        encoder = TextEncoder.of_model(files, self.work.dtype, device, streamed=self.streams_text_encoder)
        check_prompt_width(encoder, self.base.empty.config.joint_attention_dim)
        known = KnownPrompts(encoder, asked)
        del encoder
        gc.collect()  # its hooks refer to it
        if device.type == "cuda":
            torch.cuda.empty_cache()
        return cast(TextEncoder, known)

    def load_transformer(
        self, files: ModelFiles, schedule: SigmaSchedule, device: torch.device
    ) -> QwenImageTransformer:
        """The frozen transformer, its blocks where the plan says."""
        sigmas = {sigma for each in self.work.schedules for sigma in schedule.sigmas(*each).tolist()}
        return load_streamed(
            files,
            self.base.dtype,
            device,
            self.base.home.homes(self.base.blocks, self.base.int8),
            base_float8=self.base.float8,
            sigmas=sigmas if self.base.tabulated else None,
            progress=True,
        )


def free_machine(device: torch.device) -> Machine:
    """What the card can still give (other programs may be on it), with the context that this one has or will have."""
    machine = Machine.of(device)
    if machine.device_total is None:
        return machine
    free, _ = torch.cuda.mem_get_info(device)
    own = torch.cuda.memory_reserved(device)
    return machine._replace(device_total=min(device_bytes(device), free + own + CONTEXT_BYTES))


def setup_of(empty: QwenImageTransformer, work: ImageWork) -> Setup:
    """Sampling in the terms of the training plan: nothing is trained, one block's activations are there at a time."""
    blocks = empty.config.num_layers
    modulation = {id(part) for module in modulation_layers(empty) for part in module.modules()}
    tabulated = not any(id(empty.get_submodule(name)) in modulation for name in work.adapted)
    if work.resident_blocks is not None and work.resident_blocks > blocks:
        raise ValueError(f"--resident_blocks: {work.resident_blocks} blocks to keep, but the model has {blocks}")
    asked = work.resident_blocks is not None and work.resident_blocks < blocks
    if work.dora and (asked or work.precision in ("float8", "int8")):
        raise ValueError(
            "a DoRA needs whole, exact weights: leave --base_precision and --resident_blocks, or merge it into the model first "
            "(train/merge_lora.py)"
        )
    base = BasePlan(
        ModelSource("-"),
        empty,
        work.dtype,
        BaseHome(blocks if work.resident_blocks is None else work.resident_blocks),
        work.precision == "float8",
        work.precision == "int8",
        open_precision=work.precision == "auto" and not work.dora,
        open_home=work.resident_blocks is None and not work.dora,
        can_tabulate=tabulated,
        tabulated=tabulated,
    )
    loaded = -(-work.lora_parameters * LOADED_BYTES // TRAINED_BYTES)
    return Setup(base, ZeroPlan(2), loaded, torch.bfloat16, work.tokens, blocks, offload_activations=True)


def refuse_what_does_not_fit(chosen: Setup, machine: Machine, work: ImageWork) -> None:
    """Raise ValueError, naming what is needed and what there is."""
    if fits(chosen, machine) or machine.device_total is None:
        return
    plan = plan_memory(chosen, machine)
    needed, host = plan.bytes / (1 - MARGIN_SHARE) / GIB, sum(plan.host.values()) / GIB
    why = "a DoRA needs the exact base on the GPU; merge it into the model first (train/merge_lora.py), or " * work.dora
    raise ValueError(
        f"an image of {work.height}×{work.width} pixels takes {needed:.1f} GiB on the GPU beside the VAE and {host:.1f} of "
        f"host memory, but {machine.device_total_gib:.1f} and {machine.host_free / GIB:.1f} are free: {why}end "
        "other programs, make smaller images, or leave --base_precision and --resident_blocks to auto"
    )


def base_line(asked: Setup, chosen: Setup, machine: Machine, beside: int) -> str:
    base = chosen.base
    name = "float8" if base.float8 else "int8" if base.int8 else "exact"
    exact = (plan_memory(asked, machine).bytes / (1 - MARGIN_SHARE) + beside) / GIB
    return (
        f"transformer {name}, {base.home.resident} of {base.blocks} blocks stay on the GPU: the fastest that fits "
        f"{machine.device_total_gib + beside / GIB:.1f} GiB; all of it, exact, would want {exact:.1f}"
    )
