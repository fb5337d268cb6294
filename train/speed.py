"""What makes a step faster or smaller without changing its result, switched on where it holds."""

import torch

from qwen_image.modulation import is_frozen, replace_by_table
from qwen_image.pipeline import QwenImagePipeline
from qwen_image.vae import PIXEL_MULTIPLE
from train.config import TrainConfig
from train.engine import DTYPES
from train.flow import SIGMA_STEPS
from train.fused_projection import can_fuse, fuse_projections
from train.lora import LoraSpec

PARTITIONED = 3  # the ZeRO stage that spreads frozen weights over the ranks


def apply_speedups(
    config: TrainConfig, pipeline: QwenImagePipeline, spec: LoraSpec, stage: int, device: torch.device
) -> list[str]:
    """Replace the modulation by a table, fuse projections, compile blocks, as the configuration says; lines that tell.

    Raises ValueError when something is asked for that this run can't have.
    """
    transformer = pipeline.transformer
    assert transformer is not None
    lines = []
    possible = is_frozen(transformer) and stage != PARTITIONED
    if config.modulation_table == "on" and not possible:
        reason = "ZeRO-3 partitions it" if stage == PARTITIONED else "lora_target_modules reaches it"
        raise ValueError(f"modulation_table on: the modulation is no constant table here, {reason}; say auto or off")
    if config.modulation_table != "off" and possible:
        freed = replace_by_table(transformer, noise_levels(config, pipeline))
        lines.append(f"modulation tabulated, {freed / 2**30:.2f} GiB of weights dropped")
    if stage != PARTITIONED and can_fuse(spec, DTYPES[config.trained_dtype], DTYPES[config.dtype]):
        fuse_projections(transformer)
    if config.compile == "on" or (config.compile == "auto" and device.type == "cuda" and stage != PARTITIONED):
        transformer.compile_blocks()
        lines.append("blocks compiled: the first step of each shape takes a minute or two")
    return lines


def noise_levels(config: TrainConfig, pipeline: QwenImagePipeline) -> list[float]:
    """Every σ that can occur in this run: training's and validation's grid, and the schedule of the sample images."""
    sigmas = [k / SIGMA_STEPS for k in range(1, SIGMA_STEPS + 1)]
    if config.sample_prompts:
        tokens = (config.sample_height // PIXEL_MULTIPLE) * (config.sample_width // PIXEL_MULTIPLE)
        sigmas += pipeline.schedule.sigmas(config.sample_num_inference_steps, tokens).tolist()
    return sigmas
