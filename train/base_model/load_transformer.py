"""The frozen transformer of a run, loaded as planned: presets merged, float8 or not, modulation as a table.

    base = BasePlan.from_config(config, zero, spec)                     # before weights are read
    transformer = load_base(base, zero, files, schedule, ranks)

Except under ZeRO-3, weights are read tensor by tensor into what they become (qwen_image/loading/staged.py), so that loading
needs no more memory than training does.
"""

from collections.abc import Sequence
from functools import partial

import torch

from qwen_image.loading.model_files import ModelFiles
from qwen_image.loading.staged import load_staged
from qwen_image.model.transformer import QwenImageTransformer
from qwen_image.noise_schedule import SigmaSchedule
from train.base_model.base_plan import BasePlan
from train.base_model.zero3_loading import load_partitioned
from train.config.zero_plan import ZeroPlan
from train.lora.preset_loras import Preset, merge_presets, merged
from train.process.ranks import Ranks


def load_base(
    base: BasePlan, zero: ZeroPlan, files: ModelFiles, schedule: SigmaSchedule, ranks: Ranks
) -> QwenImageTransformer:
    """The transformer, on this rank's device or (stage 3) partitioned, with presets merged before anything is rounded."""
    if zero.partitioned:
        transformer = load_partitioned(files, base.dtype, zero, ranks.is_main)
        merge_presets(transformer, base.presets)
    else:
        transformer = load_staged(
            files,
            base.dtype,
            ranks.device,
            base_float8=base.float8,
            sigmas=base.noise_levels(schedule) if base.tabulated else None,
            change=partial(with_presets, base.presets) if base.presets else None,
            progress=ranks.is_main,
        )
    if base.presets:
        layers = len({name for preset in base.presets for name in preset.lora.layers})
        ranks.say(f"{len(base.presets)} preset LoRAs merged into {layers} layers")
    return transformer


def with_presets(presets: Sequence[Preset], name: str, weight: torch.Tensor) -> torch.Tensor:
    """The weight of layer `name` with the presets that adapt it."""
    return merged(weight, name, presets) if any(name in preset.lora.layers for preset in presets) else weight
