"""The memory plan: what a run will hold on each GPU and in each host's memory, told and checked before weights are read.

Weights, gradients and AdamW's state are counted; activations are an estimate from one measurement, which a trial step before
step 0 replaces (train/fit/activation_checkpointing.py). What can't work is refused with numbers; what is only likely to
fail is said.
"""

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch

from qwen_image.loading.model_files import ModelFiles
from qwen_image.loading.safetensors_ranges import read_headers
from qwen_image.model.transformer import TransformerConfig
from train.config.train_config import TrainConfig

GIB = 2**30
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
    encoders: Literal["device", "swap", "cpu"]

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

    where: Literal["device", "swap", "cpu"] = "device"
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


def device_bytes(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).total_memory


def host_bytes() -> int:
    """Memory that this host can still give: the kernel's estimate, or what the control group leaves if that is less."""
    fields = dict(line.split(":") for line in Path("/proc/meminfo").read_text().splitlines())
    free = int(fields["MemAvailable"].split()[0]) * 1024
    limit, used = Path("/sys/fs/cgroup/memory.max"), Path("/sys/fs/cgroup/memory.current")
    if limit.is_file() and used.is_file() and (text := limit.read_text().strip()) != "max":
        statistics = dict(line.split() for line in Path("/sys/fs/cgroup/memory.stat").read_text().splitlines())
        cached = sum(int(statistics.get(name, 0)) for name in ("inactive_file", "active_file"))  # given back when asked
        free = min(free, int(text) - int(used.read_text()) + cached)
    return max(free, 0)


def ranks_here() -> int:
    """How many ranks share this host, as the launcher says; 1 if it doesn't."""
    for name in ("LOCAL_WORLD_SIZE", "LOCAL_SIZE", "SLURM_NTASKS_PER_NODE"):
        text = os.environ.get(name, "")
        if text.isdigit():
            return int(text)
    return 1
