"""The frozen transformer of a run, loaded as planned: presets merged, 8 bits or not, modulation as a table, blocks at home.

    base = BasePlan.from_config(config, zero, spec, ranks)              # before weights are read
    transformer = load_base(base, files, schedule, ranks)

Weights are read tensor by tensor into what they become (qwen_image/loading/staged.py), so that loading needs no more memory
than training does; the ranks of a node take turns, so that each byte is read once.
"""

from collections.abc import Sequence
from functools import partial

import torch
import torch.distributed as dist

from qwen_image.loading.model_files import ModelFiles
from qwen_image.loading.staged import Readers
from qwen_image.model.transformer import QwenImageTransformer
from qwen_image.noise_schedule import SigmaSchedule
from qwen_image.streaming.stream_blocks import load_streamed
from train.base_model.base_plan import BasePlan
from train.lora.preset_loras import Preset, merged
from train.process.ranks import Ranks, ranks_here


def load_base(base: BasePlan, files: ModelFiles, schedule: SigmaSchedule, ranks: Ranks) -> QwenImageTransformer:
    """The transformer, its blocks where `base` says, with presets merged before anything is rounded. A collective."""
    transformer = load_streamed(
        files,
        base.dtype,
        ranks.device,
        base.home.homes(base.blocks, base.int8),
        base_float8=base.float8,
        sigmas=base.noise_levels(schedule) if base.tabulated else None,
        change=partial(with_presets, base.presets) if base.presets else None,
        progress=ranks.is_main,
        readers=node_readers(ranks),
    )
    if base.presets:
        layers = len({name for preset in base.presets for name in preset.lora.layers})
        ranks.say(f"{len(base.presets)} preset LoRAs merged into {layers} layers")
    return transformer


def node_readers(ranks: Ranks) -> Readers:
    """The ranks of this node, who read each byte of the model once between them; all ranks where nodes are unequal."""
    here = ranks_here()
    if ranks.world == 1:
        return Readers()
    return Readers(dist.new_subgroups(group_size=here if ranks.world % here == 0 else ranks.world)[0])


def with_presets(presets: Sequence[Preset], name: str, weight: torch.Tensor) -> torch.Tensor:
    """The weight of layer `name` with the presets that adapt it."""
    return merged(weight, name, presets) if any(name in preset.lora.layers for preset in presets) else weight
