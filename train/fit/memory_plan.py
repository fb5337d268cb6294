"""The memory plan: what a run will hold on each GPU and in each host's memory, told and checked before weights are read.

Weights, gradients and AdamW's state are counted; activations are an estimate from one measurement, which a trial step before
step 0 replaces (train/fit/activation_checkpointing.py). What can't work is refused with numbers; what is only likely to
fail is said.
"""

from dataclasses import dataclass
from typing import Any, NamedTuple

import torch

from qwen_image.loading.model_files import ModelFiles, ModelSource, resolve_model
from qwen_image.loading.safetensors_ranges import read_headers
from qwen_image.loading.weights import empty_transformer, match_weights
from qwen_image.model.modulation import modulation_layers
from qwen_image.model.sizes import TransformerConfig
from train.base_model.load_transformer import base_bytes, tabulates
from train.base_model.online_encoder import EncoderPlace
from train.config.train_config import TrainConfig
from train.data.batch_shapes import largest_batch
from train.data.sample import DataSet
from train.fit.activation_checkpointing import checkpointed_blocks
from train.lora.spec import LoraSpec
from train.lora.targets import resolve_targets
from train.process.free_memory import GIB, device_bytes, host_bytes
from train.process.ranks import Ranks, ranks_here

# What autograd keeps of one compiled block, in tensors of a token's width (a GELU's input alone has 4): 11.10 to 11.12 measured
# on one H100 (bf16, 60 blocks, LoRA on q, k and v, four shapes of 4,224 to 9,216 tokens).
SAVED_PER_BLOCK = 11.12
WORK = 6  # the same measurement: so many at the peak besides, gradients within a block and the end of the model
CONTEXT_BYTES = 1 * GIB  # CUDA context, NCCL, cuBLAS workspaces, fragmentation


class EncoderSizes(NamedTuple):
    """Parameters that stay in memory: the text encoder's without its vision tower and vocabulary head."""

    text_encoder: int
    vae: int

    @classmethod
    def from_files(cls, files: ModelFiles) -> "EncoderSizes":
        """From the headers of the weight files; reads no weights."""
        text = read_headers(files["text_encoder"].weights).items()
        kept = sum(stored.numel for name, stored in text if "visual." not in name and not name.startswith("lm_head"))
        return cls(kept, sum(stored.numel for stored in read_headers(files["vae"].weights).values()))


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
        if self.device_total is not None and sum(self.device.values()) > self.device_total:
            lines.append("warning: that is likely too much; see ds_configs/README.md for smaller ways")
        return lines

    def check(self) -> None:
        """Raise ValueError when what is counted does not fit."""
        counted = sum(self.device[name] for name in self.certain if name in self.device)
        if self.device_total is not None and counted > self.device_total:
            raise ValueError(
                f"weights and optimizer take {counted / GIB:.1f} GiB on each GPU, which has {self.device_total / GIB:.1f}: "
                "use more GPUs with ds_configs/zero3.json, or ds_configs/zero3_offload.json"
            )
        needed = sum(self.host.values())
        if needed > self.host_free:
            raise ValueError(
                f"offloading takes {needed / GIB:.1f} GiB of host memory ({_sum(self.host)}), but {self.host_free / GIB:.1f} "
                "are free: offload less (offload_param, --encoder_device, --offload_activations), or use more hosts"
            )


def _sum(parts: dict[str, int]) -> str:
    named = " + ".join(f"{name} {size / GIB:.2f}" for name, size in parts.items() if size)
    return f"{named} = {sum(parts.values()) / GIB:.2f} GiB"


def plan_memory(
    config: TrainConfig,
    deepspeed_config: dict[str, Any],
    shape: TransformerConfig,
    base: int,
    trainable: int,
    tokens: int,
    checkpointed_blocks: int,
    world: int,
    local_world: int,
    encoders: EncoderSizes | None,
    device: torch.device,
) -> MemoryPlan:
    """The plan of a run of `world` ranks, `local_world` of them on this host.

    Args:
        base: bytes of the frozen transformer while it trains; `trainable`: parameters of the LoRA.
        tokens: image and text tokens of the largest micro-batch, all its samples together.
        encoders: those that encode during training; None: the shards are encoded.
    """
    zero = deepspeed_config["zero_optimization"]
    partitioned = zero["stage"] == 3
    itemsize = 2 if config.dtype == "bfloat16" else 4
    on_device: dict[str, int] = {}
    on_host: dict[str, int] = {}

    share = -(-base // world) if partitioned else base
    if partitioned and zero.get("zero_hpz_partition_size", 1) > 1:
        share += -(-base // zero["zero_hpz_partition_size"])
    offloaded = partitioned and (zero.get("offload_param") or {}).get("device") == "cpu"
    (on_host if offloaded else on_device)["base"] = share * (local_world if offloaded else 1)
    if partitioned:
        live = min(base, (zero["stage3_max_live_parameters"] + zero["stage3_prefetch_bucket_size"]) * itemsize)
        # Autograd holds on to the weights of blocks that are not recomputed: DeepSpeed can't let go of them.
        kept_weights = base * (shape.num_layers - checkpointed_blocks) // max(1, shape.num_layers)
        on_device["gathered blocks"] = max(live, kept_weights)

    lora_itemsize = 2 if config.trained_dtype == "bfloat16" else 4
    on_device["LoRA and gradients"] = trainable * (lora_itemsize + 4)
    state = 3 * 4 * -(-trainable // world)  # master weights and two moments
    if (zero.get("offload_optimizer") or {}).get("device") == "cpu":
        on_host["AdamW"] = (state + 4 * -(-trainable // world)) * local_world  # and the gradients
    else:
        on_device["AdamW"] = state

    width = tokens * shape.inner_dim * itemsize
    kept = shape.num_layers - checkpointed_blocks
    on_device["activations"] = int((max(kept, 1) * SAVED_PER_BLOCK + WORK) * width)  # one block at a time at least
    if config.offload_activations:
        on_host["activations"] = checkpointed_blocks * width * local_world
    else:
        on_device["activations"] += checkpointed_blocks * width

    where: EncoderPlace = "device"
    if encoders is not None:
        text, vae = encoders.text_encoder * itemsize, encoders.vae * itemsize
        if config.encoder_device == "auto":
            room = device.type != "cuda" or text + sum(on_device.values()) + CONTEXT_BYTES < device_bytes(device)
            where = "device" if room else "swap"
        else:
            where = config.encoder_device
        if where == "device":
            on_device["encoders"] = text + vae
        elif where == "cpu":
            on_host["encoders"] = (text + vae) * local_world
        else:
            on_host["text encoder"] = text * local_world
            on_device["VAE"] = vae
    if device.type == "cuda":
        on_device["context"] = CONTEXT_BYTES
        total: int | None = device_bytes(device)
    else:
        total = None
    certain = ("base", "LoRA and gradients", "AdamW")
    return MemoryPlan(on_device, on_host, certain, total, host_bytes(), where)


def engine_bytes(
    deepspeed_config: dict[str, Any],
    trainable: int,
    config: TrainConfig,
    world: int,
    resumed: bool,
) -> int:
    """What DeepSpeed's ZeRO-2 engine will yet allocate on the device when it trains `trainable` parameters.

    Read in DeepSpeed 0.19.8: AdamW's moments come with the first step (a checkpoint brings them), reduction buffers with
    each backward pass, and float32 gradients stay from one micro-batch to the next. Other gradients are small where
    activations are at their peak: when the backward pass begins.
    """
    zero = deepspeed_config["zero_optimization"]
    share = 4 * -(-trainable // world)
    offloaded = (zero.get("offload_optimizer") or {}).get("device") == "cpu"
    moments = 0 if resumed or offloaded else 2 * share
    gradients = share if config.gradient_accumulation_steps > 1 and not offloaded else 0
    itemsize = 2 if config.trained_dtype == "bfloat16" else 4
    buffers = zero.get("reduce_bucket_size", 500_000_000) * itemsize * (2 if zero.get("overlap_comm") else 1)
    return moments + gradients + (buffers if zero.get("contiguous_gradients", True) else 0)


@dataclass(frozen=True)
class ModelSizes:
    """What is known of the model and its LoRA before weights are read."""

    shape: TransformerConfig
    base: int  # bytes of the frozen weights while they train, before ZeRO's partitioning
    trainable: int  # parameters
    checkpointed_blocks: int  # at first; train/fit/activation_checkpointing.py decides


def planned_sizes(config: TrainConfig, deepspeed_config: dict[str, Any], spec: LoraSpec) -> ModelSizes:
    """Sizes from the model's configuration alone.

    Raises what is wrong with the model's files, the LoRA's targets or the recomputed blocks before weights are read.
    """
    if spec.dora and deepspeed_config["zero_optimization"]["stage"] == 3:
        raise ValueError("lora_dora needs whole weights at every step: use ds_configs/zero2.json")
    files = resolve_model(ModelSource.from_options(config), ("transformer", "scheduler"))
    transformer = empty_transformer(files)
    match_weights(transformer, files["transformer"].weights)
    trainable = 0
    for name in resolve_targets(transformer, spec.target_modules):
        layer = transformer.get_submodule(name)
        assert isinstance(layer, torch.nn.Linear)
        trainable += spec.rank * (layer.in_features + layer.out_features) + (layer.out_features if spec.dora else 0)
    tabulated, recomputed = 0, checkpointed_blocks(config, transformer)
    if tabulates(config, deepspeed_config, spec, transformer):
        tabulated = sum(p.numel() for module in modulation_layers(transformer) for p in module.parameters())
    return ModelSizes(transformer.config, base_bytes(config, transformer, tabulated, recomputed), trainable, recomputed)


def memory_plan(
    config: TrainConfig, deepspeed_config: dict[str, Any], sizes: ModelSizes, dataset: DataSet, ranks: Ranks
) -> MemoryPlan:
    """What this run will hold, for its largest bucket and longest prompt. Raises ValueError when it can't fit."""
    encoders = None
    if not dataset.encoded:
        parts = ("text_encoder", "tokenizer", "vae")
        encoders = EncoderSizes.from_files(resolve_model(ModelSource.from_options(config), parts))
    plan = plan_memory(
        config,
        deepspeed_config,
        sizes.shape,
        base=sizes.base,
        trainable=sizes.trainable,
        tokens=largest_batch(config, dataset).tokens,
        checkpointed_blocks=sizes.checkpointed_blocks,
        world=ranks.world,
        local_world=ranks_here(),
        encoders=encoders,
        device=ranks.device,
    )
    plan.check()
    return plan
