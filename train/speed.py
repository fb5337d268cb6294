"""What makes a step faster or smaller without changing its result, switched on where it holds."""

import torch

from qwen_image.pipeline import QwenImagePipeline
from train.base import PARTITIONED
from train.config import TrainConfig
from train.engine import DTYPES
from train.fused_projection import can_fuse, fuse_projections
from train.lora import LoraSpec


def apply_speedups(
    config: TrainConfig, pipeline: QwenImagePipeline, spec: LoraSpec, stage: int, device: torch.device
) -> list[str]:
    """Fuse projections and compile blocks, as the configuration says; lines that tell of these and of the table."""
    transformer = pipeline.transformer
    assert transformer is not None
    lines = []
    if transformer.modulation_table is not None:
        lines.append(
            f"modulation tabulated in place of {transformer.modulation_table.replaced / 2**30:.2f} GiB of weights"
        )
    if stage != PARTITIONED and can_fuse(spec, DTYPES[config.trained_dtype], DTYPES[config.dtype]):
        fuse_projections(transformer)
    if config.compile == "on" or (config.compile == "auto" and device.type == "cuda" and stage != PARTITIONED):
        transformer.compile_blocks()
        lines.append("blocks compiled: the first step of each shape takes a minute or two")
    return lines
