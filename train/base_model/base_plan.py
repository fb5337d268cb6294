"""The frozen transformer of a run, as it will lie in memory: decided, checked and counted before weights are read."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch

from qwen_image.float8.linear import FLOAT8, check_float8, float8_bytes
from qwen_image.loading.model_files import ModelSource, is_here, presumed_member, resolve_model
from qwen_image.loading.weights import empty_transformer, float8_warning, full_size_transformer, match_weights
from qwen_image.model.dtypes import DTYPES
from qwen_image.model.family import TEXT_TO_IMAGE, Member
from qwen_image.model.modulation import modulation_layers
from qwen_image.model.sizes import PIXEL_MULTIPLE
from qwen_image.model.transformer import QwenImageTransformer
from qwen_image.noise_schedule import SigmaSchedule
from qwen_image.streaming.block_stream import SLOTS
from qwen_image.streaming.stream_blocks import block_layouts, stored_layout
from train.base_model.base_home import BaseHome
from train.base_model.prior_prompt import check_prior_prompt
from train.base_model.prompt_encoder import check_prompt_encoder
from train.config.train_config import TrainConfig
from train.config.zero_plan import ZeroPlan
from train.flow.timestep_sampling import SIGMA_STEPS
from train.lora.inject import check_starting_file
from train.lora.lokr import rank_lines
from train.lora.preset_loras import Preset
from train.lora.spec import LoraSpec
from train.lora.targets import base_layer, resolve_targets
from train.process.ranks import Ranks, ranks_here


@dataclass(frozen=True)
class BasePlan:
    """What the base becomes when it is loaded.

    Attributes:
        source: where its files are.
        empty: the transformer on the meta device: every name and shape, no memory.
        dtype: of all weights that are not float8, and of the activations.
        float8: the blocks' projections and MLPs in 8 bits, in which they are multiplied.
        int8: the blocks' matrices are stored in 8 bits and become `dtype` while a block computes.
        home: where the blocks lie.
        open_precision, open_home: `--base_precision` and `--resident_blocks` were left to the memory plan.
        can_tabulate: no LoRA trains the modulation layers, so that a table could stand in for them.
        tabulated: it does: a table over σ stands in for the modulation layers (qwen_image/model/modulation.py).
        presets: LoRAs that are merged into it.
        sampled: steps and image tokens of the sample images, whose noise levels the table must know too.
        notes: for people, about the files and what is put on them.
        here: its files are on this machine; else (in a dry run) `empty` is what every Qwen-Image is.
    """

    source: ModelSource
    empty: QwenImageTransformer
    dtype: torch.dtype
    home: BaseHome
    float8: bool = False
    int8: bool = False
    open_precision: bool = False
    open_home: bool = False
    can_tabulate: bool = False
    tabulated: bool = False
    presets: tuple[Preset, ...] = ()
    sampled: frozenset[tuple[int, int]] = frozenset()
    notes: tuple[str, ...] = ()
    here: bool = True
    member: Member = TEXT_TO_IMAGE

    @classmethod
    def from_config(cls, config: TrainConfig, zero: ZeroPlan, spec: LoraSpec, ranks: Ranks) -> "BasePlan":
        """Raises what is wrong with the model's or a preset's files, or can't go together, before weights are read."""
        source = ModelSource.from_options(config)
        parts = ("transformer", "scheduler")
        here = not config.dry_run or is_here(source, parts)
        files = resolve_model(source, parts) if here else None
        empty = full_size_transformer() if files is None else empty_transformer(files)
        float8 = config.base_precision == "float8"
        can_tabulate = not reaches_modulation(spec.target_modules, empty)
        tabulated = tabulates(config.modulation_table, can_tabulate)
        if float8:
            check_goes_with_float8(zero, spec)
        blocks, asked = empty.config.num_layers, config.resident_blocks
        home = BaseHome.of(zero, blocks, None if asked == "auto" else int(asked), ranks.world, ranks_here())
        int8 = config.base_precision == "int8"
        if spec.dora and (home.streamed(blocks) or int8):
            raise ValueError(
                "lora_dora needs whole, exact weights at every step: use ds_configs/zero2.json with --base_precision dtype and "
                "without --resident_blocks"
            )
        presets = tuple(Preset.read(text, empty) for text in config.preset_lora_path)
        if files is not None:
            match_weights(empty, files["transformer"].weights)
        sampled = frozenset(
            (sample.num_inference_steps, (sample.height // PIXEL_MULTIPLE) * (sample.width // PIXEL_MULTIPLE))
            for sample in config.samples()
        )
        member = presumed_member(source) if files is None else files.member
        check_prior_prompt(config.prior_prompt, member)
        if not config.dry_run:
            check_prompt_encoder(source, config.prompt_components)
        notes = (
            *(() if files is None else float8_warning(files)),
            *(note for preset in presets for note in preset.notes(member)),
        )
        notes += check_starting_file(config.lora_checkpoint, empty, spec, member)
        notes += tuple(
            rank_lines([base_layer(empty, name) for name in resolve_targets(empty, spec.target_modules)], spec)
        )
        return cls(
            source,
            empty,
            DTYPES[config.dtype],
            home,
            float8,
            int8,
            config.base_precision == "auto" and not spec.dora,
            asked == "auto" and not zero.partitioned and not spec.dora,
            can_tabulate,
            tabulated,
            presets,
            sampled,
            notes,
            here,
            member,
        )

    def lines(self, device: torch.device) -> list[str]:
        """For people: what `device` makes of it. Raises ValueError for one that can't multiply float8."""
        return [*self.notes, *(check_float8(device, self.dtype) if self.float8 else [])]

    @property
    def blocks(self) -> int:
        return self.empty.config.num_layers

    def bytes(self, checkpointed_blocks: int) -> int:
        """Bytes of the frozen weights on the device while they train, but for what `streamed_bytes` counts.

        A checkpointed block recomputes its forward pass, so it does with one layout of its float8 weights; others hold two,
        but not those that come and go.
        """
        parameters, modulation = count_parameters(self.empty)
        matrices, computed, stored = self.block_bytes()
        outside = (parameters - self.tabulated * modulation - matrices * self.blocks) * self.dtype.itemsize
        resident = self.home.on_device(self.blocks)
        again = sum(block >= checkpointed_blocks for block in resident) * float8_elements(self.empty) * self.float8
        return outside + len(resident) * (stored if self.int8 else computed) + again

    def streamed_bytes(self) -> tuple[int, int]:
        """Bytes of the blocks that come and go: of this rank's share wherever it lies, and of their buffers on the device."""
        _, computed, stored = self.block_bytes()
        streamed, slots = self.home.streamed(self.blocks), self.home.slots(self.blocks)
        if self.int8:  # resident blocks, too, become the model's dtype in a buffer
            slots = min(SLOTS, self.blocks)
        share = -(-streamed * stored // self.home.sharing)
        arrival = stored * (self.int8 and slots > 0)
        return share, slots * computed + arrival

    def block_bytes(self) -> tuple[int, int, int]:
        """Elements of a block's matrices, and their bytes as they are computed with and as they are stored."""
        return block_sizes(self.empty, self.dtype, self.float8, self.int8, self.tabulated)

    def noise_levels(self, schedule: SigmaSchedule) -> list[float]:
        """Every σ that can occur: training's and validation's grid, and the schedule of the sample images."""
        sigmas = [k / SIGMA_STEPS for k in range(1, SIGMA_STEPS + 1)]
        for steps, tokens in sorted(self.sampled):
            sigmas += schedule.sigmas(steps, tokens).tolist()
        return sigmas

    def identity(self) -> dict[str, Any]:
        """What a checkpoint remembers of the base: on another one a LoRA means nothing."""
        files = resolve_model(self.source, ("transformer",))
        model = (
            {"transformer": files.fingerprint("transformer")}
            | ({"presets": [preset.identity() for preset in self.presets]} if self.presets else {})
            | ({"base_precision": "float8"} if self.float8 else {})
            | ({"base_precision": "int8"} if self.int8 else {})
            | ({"family": files.member.name} if files.member is not TEXT_TO_IMAGE else {})
        )
        return {"model": model}


@cache
def count_parameters(transformer: QwenImageTransformer) -> tuple[int, int]:
    """All of them, and those of the modulation layers."""
    modulation = sum(p.numel() for module in modulation_layers(transformer) for p in module.parameters())
    return sum(parameter.numel() for parameter in transformer.parameters()), modulation


@cache
def float8_elements(transformer: QwenImageTransformer) -> int:
    """Of one block's matrices that a float8 base quantizes, a byte each."""
    elements, _ = float8_bytes(transformer, len(transformer.transformer_blocks))
    return elements // len(transformer.transformer_blocks)


@cache
def block_sizes(
    transformer: QwenImageTransformer, dtype: torch.dtype, float8: bool, int8: bool, tabulated: bool
) -> tuple[int, int, int]:
    """Of the first block's matrices: elements, bytes as computed with, bytes as stored."""
    layout = block_layouts(transformer, dtype, float8, tabulated)[0]
    elements = sum(piece.shape.numel() for piece in layout.pieces)
    # In float8 there are scales of the rows, and ones for the backward pass.
    size = layout.size + 4 * sum(sum(piece.shape) for piece in layout.pieces if piece.dtype == FLOAT8)
    return elements, size, stored_layout(layout).size if int8 else size


def reaches_modulation(targets: Sequence[str], transformer: QwenImageTransformer) -> bool:
    """Whether a LoRA on `targets` trains a modulation layer."""
    adapted = {id(transformer.get_submodule(name)) for name in resolve_targets(transformer, targets)}
    return any(id(part) in adapted for module in modulation_layers(transformer) for part in module.modules())


def tabulates(option: str, can_tabulate: bool) -> bool:
    """Whether a table stands in for the modulation layers (`--modulation_table`): not where a LoRA trains them.

    Raises ValueError when it must (`on`) and can't.
    """
    if option == "on" and not can_tabulate:
        raise ValueError(
            "modulation_table on: the modulation is no constant table here, lora_target_modules reaches it; say auto or off"
        )
    return option != "off" and can_tabulate


def check_goes_with_float8(zero: ZeroPlan, spec: LoraSpec) -> None:
    """Raise ValueError for what needs exact weights."""
    if zero.casts_buffers:
        raise ValueError(
            "base_precision float8: data_types.buffer_dtype would round the weights' scales: remove it from the DeepSpeed JSON"
        )
    if spec.dora:
        raise ValueError(
            "base_precision float8 does not go with lora_dora, which needs the lengths of exact weights: use dtype"
        )
