"""What is known of a run when it starts, for its first event: hardware, data, LoRA, base, memory plan. Plain values."""

import os
import platform
from typing import Any

import torch

from train.fit.memory_plan import MemoryPlan, Setup, layer_parameters
from train.loader.from_config import RunData
from train.lora.spec import LoraSpec
from train.lora.targets import group_of, resolve_targets
from train.process.ranks import Ranks
from train.reporting.data_by_source import data_by_source


def device_name(device: torch.device) -> str:
    """The GPU's name, or the CPU's with its usable cores; runs on machines of one name can be compared."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"CPU ({platform.machine()}, {len(os.sched_getaffinity(0))} cores)"


def start_facts(setup: Setup, spec: LoraSpec, data: RunData, memory: MemoryPlan, ranks: Ranks) -> dict[str, Any]:
    """JSON: `hardware`, `data`, `lora`, `optimizer`, `base`, `memory` (bytes by part), `steps`, `global_batch`."""
    base = setup.base
    return {
        "hardware": {
            "device": device_name(ranks.device),
            "device_bytes": memory.device_total,
            "ranks": ranks.world,
            "ranks_a_host": setup.local_world,
            "torch": str(torch.__version__),
        },
        "data": data_facts(data),
        "lora": {"trainable": setup.trainable, "groups": trainable_groups(setup, spec)},
        "optimizer": setup.optimizer.line(),
        "base": {
            "precision": "float8" if base.float8 else "int8" if base.int8 else str(base.dtype).removeprefix("torch."),
            "blocks": base.blocks,
            "resident_blocks": base.home.resident,
            "zero_stage": setup.zero.stage,
        },
        "memory": {"device": memory.device, "host": memory.host},
        "tokens": setup.tokens,  # of the largest micro-batch
        "steps": data.steps,
        "global_batch": data.global_batch,
    }


def data_facts(data: RunData) -> dict[str, Any]:
    """Name, kind, fingerprint, buckets with the samples in each, how many are held out, and how many have masks if any do."""
    dataset = data.dataset
    manifest = dataset.manifest
    masked = {"masked": dataset.masked} if dataset.masked else {}
    return masked | {
        "name": dataset.name,
        "encoded": dataset.encoded,
        "fingerprint": dataset.fingerprint,
        "samples": len(dataset),
        "held_out": len(getattr(dataset, "validation", ())),
        "buckets": [[bucket.width, bucket.height, bucket.count] for bucket in manifest.buckets],
        "micro_batches": None if data.order is None else data.order.length,
        **({"sources": sources} if (sources := data_by_source(data)) else {}),
    }


def trainable_groups(setup: Setup, spec: LoraSpec) -> dict[str, dict[str, int]]:
    """Layers and trainable parameters of each target group in each stream (`attention, image`)."""
    empty = setup.base.empty
    found: dict[str, dict[str, int]] = {}
    for name in resolve_targets(empty, spec.target_modules):
        entry = found.setdefault(group_of(name), {"layers": 0, "parameters": 0})
        entry["layers"] += 1
        entry["parameters"] += layer_parameters(spec, empty.get_submodule(name))
    return found
