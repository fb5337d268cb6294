"""The memory plan: what a run will hold on each GPU and in each host's memory, told and checked before weights are read.

    setup = Setup.from_config(config, zero, spec, data, ranks)
    plan = plan_memory(setup, Machine.of(ranks.device))
    plan.excess()

Weights, gradients and the optimizer's state are counted; activations are an estimate from one measurement, which a trial step
before step 0 replaces (train/fit/activation_checkpointing.py). What can't work is refused with numbers; what is only likely
to fail is said.
"""

from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple

import torch
import torch.distributed as dist

from qwen_image.encoders.text_encoder import EncoderBytes
from qwen_image.float8.linear import FIRST_CAPABILITY
from qwen_image.free_memory import CONTEXT_BYTES, GIB, device_bytes, host_bytes
from qwen_image.loading.model_files import ModelFiles, ModelSource, is_here, resolve_model
from qwen_image.loading.safetensors_ranges import read_headers
from qwen_image.model.dtypes import DTYPES
from train.base_model.base_plan import BasePlan
from train.base_model.online_encoder import EncoderPlace
from train.config.train_config import TrainConfig
from train.config.zero_plan import ZeroPlan
from train.engine.optimizer import Optimizer
from train.fit.activation_checkpointing import checkpointed_blocks
from train.loader.from_config import RunData
from train.lora.lokr import shapes
from train.lora.spec import LoraSpec
from train.lora.targets import resolve_targets
from train.process.ranks import Ranks, ranks_here

# What autograd keeps of one compiled block, in tensors of a token's width (a GELU's input alone has 4): 11.10 to 11.12 measured
# on one H100 (bf16, 60 blocks, LoRA on q, k and v, four shapes of 4,224 to 9,216 tokens).
SAVED_PER_BLOCK = 11.12
WORK = 6  # the same measurement: so many at the peak besides, gradients within a block and the end of the model
GRAPHS_BYTES = 128 << 20  # CUDA graphs: what their own pool of memory takes more than the step does without them


class EncoderSizes(NamedTuple):
    """Parameters that stay in memory: the text encoder's without its vocabulary head, its vision tower for edit models.

    `arriving`: of it, what is on the device while its layers come from host memory.
    """

    text_encoder: int
    vae: int
    arriving: int = 0

    @classmethod
    def from_files(cls, files: ModelFiles) -> "EncoderSizes":
        """From the headers of the weight files; reads no weights."""
        text = EncoderBytes.of(
            files["text_encoder"], torch.uint8, sees=files.member.most_sources > 0
        )  # a byte each: numbers of parameters
        vae = sum(stored.numel for stored in read_headers(files["vae"].weights).values())
        return cls(text.whole, vae, text.streamed)


# Qwen-Image's; for a dry run without its files.
FULL_SIZE_ENCODERS = EncoderSizes(7_070_619_136, 126_892_531, 466_119_168)


@dataclass(frozen=True)
class MemoryPlan:
    """Bytes by name: on this rank's device, and in this host's memory for all its ranks together.

    Args:
        certain: names on the device that are counted, not estimated.
        encoders: where text encoder and VAE go.
    """

    device: dict[str, int]
    host: dict[str, int]
    certain: tuple[str, ...]
    device_total: int | None  # None: the device is the CPU, and all of it is in the host's memory
    host_free: int
    encoders: EncoderPlace

    def lines(self) -> list[str]:
        """For people: one line for the device, one for the host."""
        place = "in each rank"
        if self.device_total is not None:
            place = f"on each GPU of {self.device_total / GIB:.0f} GiB (activations estimated; a trial step will tell)"
        lines = [f"memory {place}: {_sum(self.device)}"]
        if self.host:
            lines.append(f"memory of this host, {self.host_free / GIB:.0f} GiB free: {_sum(self.host)}")
        return lines

    @property
    def bytes(self) -> int:
        """On the device, all together."""
        return sum(self.device.values())

    @property
    def likely_fits(self) -> bool:
        """With the estimated parts too."""
        device_fits = self.device_total is None or sum(self.device.values()) <= self.device_total
        return device_fits and sum(self.host.values()) <= self.host_free

    def excess(self) -> str | None:
        """What can't work, as the beginning of a sentence: what is counted, not estimated, does not fit."""
        counted = sum(self.device[name] for name in self.certain if name in self.device)
        if self.device_total is not None and counted > self.device_total:
            total = self.device_total / GIB
            return f"weights and optimizer take {counted / GIB:.1f} GiB on each GPU, which has {total:.1f}"
        needed, free = sum(self.host.values()) / GIB, self.host_free / GIB
        if needed > free:
            return f"offloading takes {needed:.1f} GiB of host memory ({_sum(self.host)}), but {free:.1f} are free"
        return None


def _sum(parts: dict[str, int]) -> str:
    named = " + ".join(f"{name} {size / GIB:.2f}" for name, size in parts.items() if size)
    return f"{named} = {sum(parts.values()) / GIB:.2f} GiB"


@dataclass(frozen=True)
class Setup:
    """What decides how much memory a run takes: a value, so that a plan can be made of any change to it.

    Attributes:
        trainable: parameters of the LoRA; `lora_dtype`: of its weights in the forward pass.
        tokens: image and text tokens of the largest micro-batch, all its `batch_size` samples together.
        checkpointed_blocks: blocks that recompute their activations in the backward pass.
        world, local_world: ranks in all, and on this host.
        encoders: those that encode during training; None: the shards are encoded.
        averaged: a moving average of the LoRA's weights is kept.
        optimizer: what trains the LoRA.
    """

    base: BasePlan
    zero: ZeroPlan
    trainable: int
    lora_dtype: torch.dtype
    tokens: int
    checkpointed_blocks: int
    batch_size: int = 1
    dora: bool = False
    offload_activations: bool = False
    world: int = 1
    local_world: int = 1
    encoders: EncoderSizes | None = None
    encoder_device: Literal["auto", "device", "swap", "cpu"] = "auto"
    cuda_graphs: bool = False
    averaged: bool = False
    optimizer: Optimizer = field(default_factory=Optimizer)

    @classmethod
    def from_config(cls, config: TrainConfig, zero: ZeroPlan, spec: LoraSpec, data: RunData, ranks: Ranks) -> "Setup":
        """Of a run, for its largest bucket and longest prompt. Raises what BasePlan does, FileNotFoundError for encoders."""
        base = BasePlan.from_config(config, zero, spec, ranks)
        encoders = None
        if not data.dataset.encoded:
            parts = ("text_encoder", "tokenizer", "vae")
            source = ModelSource.from_options(config)
            here = not config.dry_run or is_here(source, parts)
            encoders = EncoderSizes.from_files(resolve_model(source, parts)) if here else FULL_SIZE_ENCODERS
        return cls(
            base,
            zero,
            trainable_parameters(spec, base),
            DTYPES[config.trained_dtype],
            data.largest.tokens,
            checkpointed_blocks(config.activation_checkpointing, base.blocks),
            config.batch_size,
            spec.dora,
            config.offload_activations,
            ranks.world,
            ranks_here(),
            encoders,
            config.encoder_device,
            config.cuda_graphs != "off" and ranks.device.type == "cuda",
            config.ema_decay is not None,
            Optimizer.from_config(config),
        )


def trainable_parameters(spec: LoraSpec, base: BasePlan) -> int:
    """How many parameters the LoRA has: rank · (in + out) a layer, and DoRA's magnitude of each output; or those of a LoKr."""
    names = resolve_targets(base.empty, spec.target_modules)
    return sum(layer_parameters(spec, base.empty.get_submodule(name)) for name in names)


def layer_parameters(spec: LoraSpec, layer: torch.nn.Module) -> int:
    """Of the LoRA on one linear layer."""
    assert isinstance(layer, torch.nn.Linear)
    if spec.is_lokr:
        matrices = shapes(layer.out_features, layer.in_features, spec.rank, spec.factor, spec.decompose_both)
        return sum(rows * columns for rows, columns in matrices.values())
    return spec.rank * (layer.in_features + layer.out_features) + (layer.out_features if spec.dora else 0)


class Machine(NamedTuple):
    """Bytes of this rank's GPU (None: it has none, everything is in the host's memory), and free ones of this host."""

    device_total: int | None
    host_free: int
    multiplies_float8: bool = False

    @classmethod
    def of(cls, device: torch.device) -> "Machine":
        if device.type != "cuda":
            return cls(None, host_bytes())
        return cls(device_bytes(device), host_bytes(), torch.cuda.get_device_capability(device) >= FIRST_CAPABILITY)

    def smallest(self, ranks: Ranks) -> "Machine":
        """The least of all ranks' machines, so that all decide alike; a collective."""
        if ranks.world == 1:
            return self
        everywhere: list[Any] = [None] * ranks.world
        dist.all_gather_object(everywhere, tuple(self))
        totals, free, multiplies = zip(*everywhere, strict=True)
        return Machine(None if None in totals else min(totals), min(free), all(multiplies))

    @property
    def device_total_gib(self) -> float:
        return (self.device_total or 0) / GIB


def plan_memory(setup: Setup, machine: Machine) -> MemoryPlan:
    """What such a run holds on such a machine."""
    zero, world, base = setup.zero, setup.world, setup.base
    itemsize = base.dtype.itemsize
    on_device = {"base": base.bytes(setup.checkpointed_blocks)}
    on_host: dict[str, int] = {}
    share, buffers = base.streamed_bytes()
    if base.home.host and share:
        on_host["base"] = share * setup.local_world
    elif share:
        on_device["base"] += share
    if buffers:
        on_device["arriving blocks"] = buffers
    kept = base.blocks - setup.checkpointed_blocks

    on_device["LoRA and gradients"] = setup.trainable * (setup.lora_dtype.itemsize + 4)
    state, label = setup.optimizer.bytes(setup.trainable, world), setup.optimizer.label
    if zero.offload_optimizer:
        on_host[label] = (state + 4 * -(-setup.trainable // world)) * setup.local_world  # and the gradients
        if setup.optimizer.whole and world > 1:
            on_device["whole gradient"] = 4 * setup.trainable  # of a step, on its way to the host
    else:
        on_device[label] = state
    if setup.averaged:
        average = 4 * -(-setup.trainable // world)
        if zero.offload_optimizer:
            on_host["EMA"] = average * setup.local_world
        else:
            on_device["EMA"] = average

    width = setup.tokens * setup.base.empty.config.inner_dim * itemsize
    on_device["activations"] = int((max(kept, 1) * SAVED_PER_BLOCK + WORK) * width)  # one block at a time at least
    if setup.offload_activations:
        on_host["activations"] = setup.checkpointed_blocks * width * setup.local_world
    else:
        on_device["activations"] += setup.checkpointed_blocks * width

    where = place_encoders(setup, machine, on_device, on_host)
    if machine.device_total is not None:
        on_device["CUDA graphs"] = graphs_bytes(setup)
        on_device["context"] = CONTEXT_BYTES
    certain = ("base", "arriving blocks", "LoRA and gradients", label, "EMA")
    return MemoryPlan(on_device, on_host, certain, machine.device_total, machine.host_free, where)


def graphs_bytes(setup: Setup) -> int:
    """What a step takes more by replaying CUDA graphs.

    The memory of their activations serves nothing else, so what an optimizer step otherwise puts there comes on top: the
    buffer that gradients leave through, its copy, and the same in float32.
    """
    return setup.trainable * (2 * setup.lora_dtype.itemsize + 4) + GRAPHS_BYTES if setup.cuda_graphs else 0


def place_encoders(setup: Setup, machine: Machine, on_device: dict[str, int], on_host: dict[str, int]) -> EncoderPlace:
    """Where text encoder and VAE go, by `--encoder_device` and the room that is left; adds what they take."""
    if setup.encoders is None:
        return "device"
    text, vae, arriving = (size * setup.base.dtype.itemsize for size in setup.encoders)
    where = setup.encoder_device
    if where == "auto":
        total = machine.device_total
        where = "device" if total is None or text + sum(on_device.values()) + CONTEXT_BYTES < total else "swap"
    if where == "device":
        on_device["encoders"] = text + vae
    elif where == "cpu":
        on_host["encoders"] = (text + vae) * setup.local_world
    else:
        on_host["text encoder"] = text * setup.local_world
        on_device["VAE"], on_device["text encoder's layers"] = vae, arriving
    return where


def engine_bytes(
    zero: ZeroPlan,
    trainable: int,
    lora_dtype: torch.dtype,
    world: int,
    accumulation: int,
    resumed: bool,
    optimizer: Optimizer | None = None,
) -> int:
    """What DeepSpeed's ZeRO-2 engine will yet allocate on the device when it trains `trainable` parameters.

    Read in DeepSpeed 0.19.8: the optimizer's state comes with the first step (a checkpoint brings it), reduction buffers with
    each backward pass, and float32 gradients stay from one micro-batch to the next. Other gradients, and what an optimizer
    needs during a step alone, are small where activations are at their peak: when the backward pass begins.
    """
    share = 4 * -(-trainable // world)
    state = (optimizer or Optimizer()).state_bytes(trainable, world)
    moments = 0 if resumed or zero.offload_optimizer else state
    gradients = share if accumulation > 1 and not zero.offload_optimizer else 0
    buffers = zero.reduce_bucket_size * lora_dtype.itemsize * (2 if zero.overlap_comm else 1)
    return moments + gradients + (buffers if zero.contiguous_gradients else 0)
