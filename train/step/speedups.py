"""What makes a step faster or smaller and changes its result by rounding at most, switched on where it helps."""

import os

import torch
import torch._dynamo.utils

from qwen_image.kernel_check import distrust_kernels
from qwen_image.kernels.flash_attention import HOPPER
from qwen_image.model.dtypes import DTYPES
from qwen_image.pipeline import QwenImagePipeline
from train.config.deepspeed_json import PARTITIONED
from train.config.train_config import TrainConfig
from train.lora.spec import LoraSpec
from train.step.flow_matching_module import FlowMatchingModule
from train.step.fused_projection import can_fuse, fuse_projections


def choose_workspaces(device: torch.device, deterministic: bool) -> None:
    """Set how much memory cuBLAS may work in, by the environment, if the user hasn't; before its first product.

    Without any it chooses kernels for Hopper whose schedule is fixed in advance. The others count tiles in that memory and
    have it zeroed before each product: 5 µs, 14 times a block. PyTorch's deterministic mode insists on a workspace.
    """
    if deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    elif device.type == "cuda" and torch.cuda.get_device_capability(device)[0] == HOPPER:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":0:0")
        os.environ.setdefault("CUBLASLT_WORKSPACE_SIZE", "0")


def apply_speedups(
    config: TrainConfig, pipeline: QwenImagePipeline, spec: LoraSpec, stage: int, device: torch.device
) -> list[str]:
    """Try the kernels, fuse projections, and compile blocks, as the configuration says; lines that tell of it."""
    transformer = pipeline.transformer
    assert transformer is not None
    float8 = config.base_precision == "float8"
    lines = distrust_kernels(transformer.config, DTYPES[config.dtype], device, float8)
    if transformer.modulation_table is not None:
        lines.append(
            f"modulation tabulated in place of {transformer.modulation_table.replaced / 2**30:.2f} GiB of weights"
        )
    if stage != PARTITIONED and can_fuse(spec, DTYPES[config.trained_dtype], DTYPES[config.dtype]):
        fuse_projections(transformer)
    if config.compile == "on" or (config.compile == "auto" and device.type == "cuda" and stage != PARTITIONED):
        transformer.compile_blocks(dynamic=True)
        lines.append("blocks compiled: before the first step that takes a minute")
    transformer.draws_random_numbers = config.lora_dropout > 0
    return lines


def shapes_met(module: FlowMatchingModule) -> list[str]:
    """For the end of a run: how often the compiler ran, and how many shapes have CUDA graphs."""
    compiled = int(torch._dynamo.utils.counters["stats"]["unique_graphs"])
    lines = [f"{compiled} graphs compiled"] if compiled else []
    if module.graphs is not None:
        lines.append(f"CUDA graphs of {len(module.graphs.pairs)} shapes of batches")
    return lines
