"""The training step around a frozen transformer, set up once and in order: LoRA in, fused, compiled, wrapped into its loss.

step = build_step(transformer, spec, StepOptions.from_config(config, zero, device, checkpointed_blocks))
step.module(latents, noise, sigma, prompt, loss_mask)               # losses [B]; DeepSpeed's engine wraps the module
"""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import torch

from files.shown import shown
from qwen_image.float8.linear import keep_transposed
from qwen_image.kernel_check import distrust_kernels
from qwen_image.model.dtypes import DTYPES
from qwen_image.model.transformer import QwenImageTransformer
from train.config.run_files import lora_file
from train.config.train_config import TrainConfig
from train.flow.objective import WeightingName
from train.lora.inject import inject_lora, start_from
from train.lora.lora_file import read_lora
from train.lora.spec import LoraSpec
from train.process import start_clock
from train.step.flow_matching_module import FlowMatchingModule
from train.step.fused_projection import can_fuse, fuse_projections
from train.step.offload_activations import ActivationOffload


@dataclass(frozen=True, kw_only=True)
class StepOptions:
    """How the step is computed. Besides the loss's weighting and mask nothing here changes what it computes, up to rounding.

    Attributes:
        dtype: of the activations; `lora_dtype`: of the LoRA's weights in the forward pass.
        seed: of the LoRA's initial weights; `lora_checkpoint`: the file whose weights they are instead.
        mask_min_weight: the loss is masked, with this weight outside; None: it isn't.
        float8: the base is in float8 (for the kernels that are tried).
        fuse: q, k and v as one product where that is possible.
        compile: the blocks, by torch.compile; `dynamic`: once for all shapes.
        checkpointed_blocks: so many leading blocks recompute their activations in the backward pass.
        offload_activations: what these start from waits in host memory.
    """

    dtype: torch.dtype
    lora_dtype: torch.dtype
    device: torch.device
    seed: int = 0
    lora_checkpoint: Path | None = None
    loss_weighting: WeightingName = "none"
    mask_min_weight: float | None = None
    float8: bool = False
    fuse: bool = True
    compile: bool = False
    dynamic: bool = True
    checkpointed_blocks: int = 0
    offload_activations: bool = False

    @classmethod
    def from_config(
        cls, config: TrainConfig, float8: bool, device: torch.device, checkpointed_blocks: int
    ) -> "StepOptions":
        return cls(
            dtype=DTYPES[config.dtype],
            lora_dtype=DTYPES[config.trained_dtype],
            device=device,
            seed=config.seed,
            lora_checkpoint=config.lora_checkpoint,
            loss_weighting=config.loss_weighting,
            mask_min_weight=config.mask_min_weight if config.masked_loss else None,
            float8=float8,
            compile=config.compile == "on" or (config.compile == "auto" and device.type == "cuda"),
            checkpointed_blocks=checkpointed_blocks,
            offload_activations=config.offload_activations,
        )


class Step(NamedTuple):
    """The module that computes the loss, the names of the adapted layers, and lines that tell what was switched on."""

    module: FlowMatchingModule
    adapted: list[str]
    lines: list[str]


def build_step(
    transformer: QwenImageTransformer,
    spec: LoraSpec,
    options: StepOptions,
    say: Callable[[str], None] = print,
) -> Step:
    """Freeze `transformer`, put a LoRA into it, and make it the training step.

    Raises ValueError for targets that the transformer lacks, and for a `lora_checkpoint` that doesn't fit.
    """
    adapted = inject_lora(transformer, spec, options.seed, options.lora_dtype)
    if options.lora_checkpoint is not None:
        filled = start_from(transformer, read_lora(options.lora_checkpoint, transformer), spec)
        say(f"starting from {shown(lora_file(options.lora_checkpoint))}: {filled} of {len(adapted)} layers")
    lines = distrust_kernels(transformer.config, options.dtype, options.device, options.float8)
    if transformer.modulation_table is not None:
        lines.append(
            f"modulation tabulated in place of {transformer.modulation_table.replaced / 2**30:.2f} GiB of weights"
        )
    if options.fuse and can_fuse(spec, options.lora_dtype, options.dtype):
        fuse_projections(transformer)
    if options.compile:
        transformer.compile_blocks(dynamic=options.dynamic)
        lines.append("blocks compiled: before the first step that takes a minute")
    transformer.draws_random_numbers = spec.dropout > 0
    transformer.checkpointed_blocks = options.checkpointed_blocks
    keep_transposed(transformer, options.checkpointed_blocks)
    if options.offload_activations:
        transformer.saved_inputs = ActivationOffload(options.device)
    start_clock.reached("LoRA")
    module = FlowMatchingModule(transformer, options.loss_weighting, options.dtype, options.mask_min_weight)
    return Step(module, adapted, lines)
