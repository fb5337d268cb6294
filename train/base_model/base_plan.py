"""The frozen transformer of a run, as it will lie in memory: decided, checked and counted before weights are read."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch

from qwen_image.float8.linear import check_float8, float8_bytes
from qwen_image.loading.model_files import ModelSource, resolve_model
from qwen_image.loading.weights import empty_transformer, float8_warning, match_weights
from qwen_image.model.dtypes import DTYPES
from qwen_image.model.modulation import modulation_layers
from qwen_image.model.sizes import PIXEL_MULTIPLE
from qwen_image.model.transformer import QwenImageTransformer
from qwen_image.noise_schedule import SigmaSchedule
from train.config.train_config import TrainConfig
from train.config.zero_plan import ZeroPlan
from train.flow.timestep_sampling import SIGMA_STEPS
from train.lora.inject import check_starting_file
from train.lora.preset_loras import Preset
from train.lora.spec import LoraSpec
from train.lora.targets import resolve_targets


@dataclass(frozen=True)
class BasePlan:
    """What the base becomes when it is loaded.

    Attributes:
        source: where its files are.
        empty: the transformer on the meta device: every name and shape, no memory.
        dtype: of all weights that are not float8, and of the activations.
        float8: the blocks' projections and MLPs in 8 bits.
        can_tabulate: no LoRA trains the modulation layers, so that a table could stand in for them.
        tabulated: it does: a table over σ stands in for the modulation layers (qwen_image/model/modulation.py).
        presets: LoRAs that are merged into it.
        sampled: steps and image tokens of the sample images, whose noise levels the table must know too; None: no images.
        notes: for people, about the files.
    """

    source: ModelSource
    empty: QwenImageTransformer
    dtype: torch.dtype
    float8: bool = False
    can_tabulate: bool = False
    tabulated: bool = False
    presets: tuple[Preset, ...] = ()
    sampled: tuple[int, int] | None = None
    notes: tuple[str, ...] = ()

    @classmethod
    def from_config(cls, config: TrainConfig, zero: ZeroPlan, spec: LoraSpec) -> "BasePlan":
        """Raises what is wrong with the model's or a preset's files, or can't go together, before weights are read."""
        source = ModelSource.from_options(config)
        files = resolve_model(source, ("transformer", "scheduler"))
        empty = empty_transformer(files)
        float8 = config.base_precision == "float8"
        can_tabulate = not reaches_modulation(spec.target_modules, empty)
        tabulated = tabulates(config.modulation_table, zero.partitioned, can_tabulate)
        if float8:
            check_goes_with_float8(zero, spec)
        presets = tuple(Preset.read(text, empty) for text in config.preset_lora_path)
        match_weights(empty, files["transformer"].weights)
        sampled = None
        if config.sample_prompts:
            tokens = (config.sample_height // PIXEL_MULTIPLE) * (config.sample_width // PIXEL_MULTIPLE)
            sampled = config.sample_num_inference_steps, tokens
        notes = (*float8_warning(files), *(note for preset in presets for note in preset.lora.notes))
        notes += check_starting_file(config.lora_checkpoint, empty, spec)
        return cls(source, empty, DTYPES[config.dtype], float8, can_tabulate, tabulated, presets, sampled, notes)

    def lines(self, device: torch.device) -> list[str]:
        """For people: what `device` makes of it. Raises ValueError for one that can't multiply float8."""
        return [*self.notes, *(check_float8(device, self.dtype) if self.float8 else [])]

    @property
    def blocks(self) -> int:
        return self.empty.config.num_layers

    def bytes(self, checkpointed_blocks: int) -> int:
        """Bytes of the frozen weights while they train, before ZeRO's partitioning.

        A checkpointed block recomputes its forward pass, so it does with one layout of its float8 weights; others hold two.
        """
        parameters, modulation = count_parameters(self.empty)
        quantized, size = count_float8(self.empty, checkpointed_blocks) if self.float8 else (0, 0)
        return (parameters - quantized - self.tabulated * modulation) * self.dtype.itemsize + size

    def noise_levels(self, schedule: SigmaSchedule) -> list[float]:
        """Every σ that can occur: training's and validation's grid, and the schedule of the sample images."""
        sigmas = [k / SIGMA_STEPS for k in range(1, SIGMA_STEPS + 1)]
        if self.sampled is not None:
            sigmas += schedule.sigmas(*self.sampled).tolist()
        return sigmas

    def identity(self) -> dict[str, Any]:
        """What a checkpoint remembers of the base: on another one a LoRA means nothing."""
        files = resolve_model(self.source, ("transformer",))
        model = (
            {"transformer": files.fingerprint("transformer")}
            | ({"presets": [preset.identity() for preset in self.presets]} if self.presets else {})
            | ({"base_precision": "float8"} if self.float8 else {})
        )
        return {"model": model}


@cache
def count_parameters(transformer: QwenImageTransformer) -> tuple[int, int]:
    """All of them, and those of the modulation layers."""
    modulation = sum(p.numel() for module in modulation_layers(transformer) for p in module.parameters())
    return sum(parameter.numel() for parameter in transformer.parameters()), modulation


count_float8 = cache(float8_bytes)  # both are asked for many times when the cheapest change is looked for


def reaches_modulation(targets: Sequence[str], transformer: QwenImageTransformer) -> bool:
    """Whether a LoRA on `targets` trains a modulation layer."""
    adapted = {id(transformer.get_submodule(name)) for name in resolve_targets(transformer, targets)}
    return any(id(part) in adapted for module in modulation_layers(transformer) for part in module.modules())


def tabulates(option: str, partitioned: bool, can_tabulate: bool) -> bool:
    """Whether a table stands in for the modulation layers (`--modulation_table`): not where weights are partitioned, nor
    where a LoRA trains them. Raises ValueError when it must (`on`) and can't.
    """
    possible = can_tabulate and not partitioned
    if option == "on" and not possible:
        reason = "ZeRO-3 partitions it" if partitioned else "lora_target_modules reaches it"
        raise ValueError(f"modulation_table on: the modulation is no constant table here, {reason}; say auto or off")
    return option != "off" and possible


def check_goes_with_float8(zero: ZeroPlan, spec: LoraSpec) -> None:
    """Raise ValueError for what needs exact weights, or weights of one type."""
    if zero.partitioned:
        raise ValueError(
            "base_precision float8 does not go with ZeRO-3, which partitions weights of one type: use ds_configs/zero2.json "
            "(a float8 base takes 13 GB on each GPU)"
        )
    if zero.casts_buffers:
        raise ValueError(
            "base_precision float8: data_types.buffer_dtype would round the weights' scales: remove it from the DeepSpeed JSON"
        )
    if spec.dora:
        raise ValueError(
            "base_precision float8 does not go with lora_dora, which needs the lengths of exact weights: use dtype"
        )
