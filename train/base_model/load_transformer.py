"""The frozen transformer of a run, as the configuration wants it: presets merged, float8 or not, modulation as a table.

    lines = check_base(config, deepspeed_config, spec, ranks.device)     # before weights are read
    presets = read_presets(config)
    transformer = load_base(config, deepspeed_config, files, schedule, spec, presets, ranks)

Except under ZeRO-3, weights are read tensor by tensor into what they become (qwen_image/loading/staged.py), so that loading
needs no more memory than training does.
"""

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch

from qwen_image.float8.linear import check_float8, float8_bytes
from qwen_image.loading.model_files import ModelFiles, ModelSource, resolve_model
from qwen_image.loading.staged import load_staged
from qwen_image.loading.weights import empty_transformer
from qwen_image.model.dtypes import DTYPES
from qwen_image.model.modulation import modulation_layers
from qwen_image.model.sizes import PIXEL_MULTIPLE
from qwen_image.model.transformer import QwenImageTransformer
from qwen_image.noise_schedule import SigmaSchedule
from train.base_model.zero3_loading import load_partitioned
from train.config.deepspeed_json import PARTITIONED
from train.config.train_config import TrainConfig
from train.flow.timestep_sampling import SIGMA_STEPS
from train.lora.preset_loras import Preset, merge_presets, merged
from train.lora.spec import LoraSpec
from train.lora.targets import resolve_targets
from train.process.ranks import Ranks


def check_base(
    config: TrainConfig, deepspeed_config: dict[str, Any], spec: LoraSpec, device: torch.device
) -> list[str]:
    """Lines about the frozen weights for people. Raises ValueError for what can't be, before weights are read."""
    transformer = empty_transformer(resolve_model(ModelSource.from_options(config), ("transformer",)))
    tabulates(config, deepspeed_config, spec, transformer)
    if config.base_precision != "float8":
        return []
    if deepspeed_config["zero_optimization"]["stage"] == PARTITIONED:
        raise ValueError(
            "base_precision float8 does not go with ZeRO-3, which partitions weights of one type: use ds_configs/zero2.json "
            "(a float8 base takes 13 GB on each GPU)"
        )
    if "buffer_dtype" in deepspeed_config.get("data_types", {}):
        raise ValueError(
            "base_precision float8: data_types.buffer_dtype would round the weights' scales: remove it from the DeepSpeed JSON"
        )
    if spec.dora:
        raise ValueError(
            "base_precision float8 does not go with lora_dora, which needs the lengths of exact weights: use dtype"
        )
    return check_float8(device, DTYPES[config.dtype])


def tabulates(
    config: TrainConfig, deepspeed_config: dict[str, Any], spec: LoraSpec, transformer: QwenImageTransformer
) -> bool:
    """Whether a table stands in for the modulation layers. Raises ValueError when it must (`on`) and can't."""
    stage = deepspeed_config["zero_optimization"]["stage"]
    adapted = {id(transformer.get_submodule(name)) for name in resolve_targets(transformer, spec.target_modules)}
    parts = [part for module in modulation_layers(transformer) for part in module.modules()]
    reached = any(id(part) in adapted for part in parts)
    if config.modulation_table == "on" and (reached or stage == PARTITIONED):
        reason = "ZeRO-3 partitions it" if stage == PARTITIONED else "lora_target_modules reaches it"
        raise ValueError(f"modulation_table on: the modulation is no constant table here, {reason}; say auto or off")
    return config.modulation_table != "off" and not reached and stage != PARTITIONED


def read_presets(config: TrainConfig) -> list[Preset]:
    """Raises what is wrong with a preset's file, before weights are read."""
    if not config.preset_lora_path:
        return []
    transformer = empty_transformer(resolve_model(ModelSource.from_options(config), ("transformer",)))
    return [Preset.read(text, transformer) for text in config.preset_lora_path]


def load_base(
    config: TrainConfig,
    deepspeed_config: dict[str, Any],
    files: ModelFiles,
    schedule: SigmaSchedule,
    spec: LoraSpec,
    presets: Sequence[Preset],
    ranks: Ranks,
) -> QwenImageTransformer:
    """The transformer, on this rank's device or (stage 3) partitioned, with `presets` merged before anything is rounded."""
    dtype = DTYPES[config.dtype]
    layers = len({name for preset in presets for name in preset.lora.layers})
    if deepspeed_config["zero_optimization"]["stage"] == PARTITIONED:
        transformer = load_partitioned(files, dtype, deepspeed_config, ranks.is_main)
        merge_presets(transformer, presets)
    else:
        sigmas = None
        if tabulates(config, deepspeed_config, spec, empty_transformer(files)):
            sigmas = noise_levels(config, schedule)
        transformer = load_staged(
            files,
            dtype,
            ranks.device,
            base_float8=config.base_precision == "float8",
            sigmas=sigmas,
            change=partial(with_presets, presets) if presets else None,
            progress=ranks.is_main,
        )
    if presets:
        ranks.say(f"{len(presets)} preset LoRAs merged into {layers} layers")
    return transformer


def with_presets(presets: Sequence[Preset], name: str, weight: torch.Tensor) -> torch.Tensor:
    """The weight of layer `name` with the presets that adapt it."""
    return merged(weight, name, presets) if any(name in preset.lora.layers for preset in presets) else weight


def noise_levels(config: TrainConfig, schedule: SigmaSchedule) -> list[float]:
    """Every σ that can occur in this run: training's and validation's grid, and the schedule of the sample images."""
    sigmas = [k / SIGMA_STEPS for k in range(1, SIGMA_STEPS + 1)]
    if config.sample_prompts:
        tokens = (config.sample_height // PIXEL_MULTIPLE) * (config.sample_width // PIXEL_MULTIPLE)
        sigmas += schedule.sigmas(config.sample_num_inference_steps, tokens).tolist()
    return sigmas


def base_bytes(config: TrainConfig, transformer: QwenImageTransformer, tabulated: int, checkpointed_blocks: int) -> int:
    """Bytes of the frozen transformer while it trains, without ZeRO's partitioning; it may be on the meta device.

    Args:
        tabulated: parameters that the modulation table replaces.
    """
    parameters = sum(parameter.numel() for parameter in transformer.parameters()) - tabulated
    quantized = size = 0
    if config.base_precision == "float8":
        quantized, size = float8_bytes(transformer, checkpointed_blocks)
    return (parameters - quantized) * DTYPES[config.dtype].itemsize + size
