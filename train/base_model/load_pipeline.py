"""The frozen pipeline of a run: which components it needs, and whether its data was made for it."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from data_prep.encoding.encoder_facts import LATENTS, PROMPTS, check_encoding
from qwen_image.loading.model_files import (
    ModelSource,
    empty_transformer,
    match_weights,
    resolve_model,
    transformer_config,
)
from qwen_image.loading.pinned_memory import pin
from qwen_image.model.modulation import modulation_layers
from qwen_image.model.transformer import QwenImageTransformer, TransformerConfig
from qwen_image.pipeline import QwenImagePipeline
from train.base_model.load_transformer import base_bytes, load_base, tabulates
from train.config.train_config import TrainConfig
from train.data.largest_batch import largest_batch
from train.data.shard_dataset import ShardDataset
from train.engine.deepspeed_engine import DTYPES, Ranks
from train.fit.memory_plan import EncoderSizes, MemoryPlan, plan_memory, ranks_here
from train.flow.objective import SigmaSampling
from train.lora.inject import LoraSpec, resolve_targets
from train.lora.preset_loras import Preset
from train.step.flow_matching_module import OnlineEncoder


def load_pipeline(
    config: TrainConfig,
    deepspeed_config: dict[str, Any],
    dataset: ShardDataset,
    ranks: Ranks,
    plan: MemoryPlan,
    spec: LoraSpec,
    presets: Sequence[Preset],
) -> QwenImagePipeline:
    """The transformer (load_transformer.py), and both encoders when the shards hold images; these go where `plan` says.

    Raises ValueError when the shards were encoded for another model, before weights are read.
    """
    source, dtype = ModelSource.from_options(config), DTYPES[config.dtype]
    files = resolve_model(source, ("transformer", "scheduler"))
    if dataset.encoded:
        check_data(config, dataset, transformer_config(files).joint_attention_dim)
    pipeline = QwenImagePipeline.from_pretrained(
        source,
        components=() if dataset.encoded else ("text_encoder", "vae"),
        dtype=dtype,
        device=ranks.device if plan.encoders == "device" else "cpu",
    )
    if plan.encoders == "swap" and pipeline.vae is not None and pipeline.text_encoder is not None:
        pipeline.vae.to(ranks.device)
        if ranks.device.type == "cuda":
            pin(pipeline.text_encoder.language_model)
    transformer = load_base(config, deepspeed_config, files, pipeline.schedule, spec, presets, ranks)
    return replace(pipeline, transformer=transformer, files=files)


def check_data(config: TrainConfig, dataset: ShardDataset, prompt_width: int) -> None:
    """Refuse encoded shards of another model: by their conventions, the prompts' width, and the encoders if at hand."""
    encoding = dataset.manifest.encoding or {}
    own: dict[str, str] = {"latents": LATENTS, "prompts": PROMPTS}
    for component in ("vae", "text_encoder"):
        try:
            files = resolve_model(ModelSource.from_options(config), (component,), local_only=True)
            own[component] = files.fingerprint(component)
        except FileNotFoundError:
            continue  # training needs no encoder, so it may well lie elsewhere
    check_encoding(config.data, encoding, own, config.model)
    assert dataset.empty_prompt is not None
    if dataset.empty_prompt.shape[1] != prompt_width:
        raise ValueError(
            f"{config.data}: prompt embeddings are {dataset.empty_prompt.shape[1]} wide, but {config.model} takes "
            f"{prompt_width}: the shards were encoded for another model"
        )


@dataclass(frozen=True)
class ModelSizes:
    """What is known of the model and its LoRA before weights are read."""

    shape: TransformerConfig
    base: int  # bytes of the frozen weights while they train, before ZeRO's partitioning
    trainable: int  # parameters
    checkpointed_blocks: int  # at first; train/fit/activation_checkpointing.py decides


def planned_sizes(config: TrainConfig, deepspeed_config: dict[str, Any], spec: LoraSpec) -> ModelSizes:
    """Sizes from the model's configuration alone.

    Raises what is wrong with the model's files, the LoRA's targets or the recomputed blocks before weights are read.
    """
    if spec.dora and deepspeed_config["zero_optimization"]["stage"] == 3:
        raise ValueError("lora_dora needs whole weights at every step: use ds_configs/zero2.json")
    files = resolve_model(ModelSource.from_options(config), ("transformer", "scheduler"))
    transformer = empty_transformer(files)
    match_weights(transformer, files["transformer"].weights)
    trainable = 0
    for name in resolve_targets(transformer, spec.target_modules):
        layer = transformer.get_submodule(name)
        assert isinstance(layer, torch.nn.Linear)
        trainable += spec.rank * (layer.in_features + layer.out_features) + (layer.out_features if spec.dora else 0)
    tabulated, recomputed = 0, checkpointed_blocks(config, transformer)
    if tabulates(config, deepspeed_config, spec, transformer):
        tabulated = sum(p.numel() for module in modulation_layers(transformer) for p in module.parameters())
    return ModelSizes(transformer.config, base_bytes(config, transformer, tabulated, recomputed), trainable, recomputed)


def memory_plan(
    config: TrainConfig, deepspeed_config: dict[str, Any], sizes: ModelSizes, dataset: ShardDataset, ranks: Ranks
) -> MemoryPlan:
    """What this run will hold, for its largest bucket and longest prompt. Raises ValueError when it can't fit."""
    encoders = None
    if not dataset.encoded:
        parts = ("text_encoder", "tokenizer", "vae")
        encoders = EncoderSizes.from_files(resolve_model(ModelSource.from_options(config), parts))
    plan = plan_memory(
        config,
        deepspeed_config,
        sizes.shape,
        base=sizes.base,
        trainable=sizes.trainable,
        tokens=largest_batch(config, dataset).tokens,
        checkpointed_blocks=sizes.checkpointed_blocks,
        world=ranks.world,
        local_world=ranks_here(),
        encoders=encoders,
        device=ranks.device,
    )
    plan.check()
    return plan


def needed_bytes(config: TrainConfig, weights: int, steps: int) -> int:
    """What the run's LoRA files and checkpoints (weights and two moments in float32) will take on the disk."""
    files = 1 + (steps // config.save_steps if config.save_steps else 0)
    saved = steps // config.checkpoint_every if config.checkpoint_every else 1
    kept = config.keep_checkpoints + 1 + (steps // config.keep_every if config.keep_every else 0)
    checkpoints = min(saved, kept) if config.keep_checkpoints else saved
    return weights * (files * DTYPES[config.save_dtype].itemsize + max(1, checkpoints) * 3 * 4)


def online_encoder(config: TrainConfig, pipeline: QwenImagePipeline, ranks: Ranks, plan: MemoryPlan) -> OnlineEncoder:
    options = config.max_prompt_tokens, config.text_multiple, ranks.device, plan.encoders == "swap"
    return OnlineEncoder(pipeline.vae, pipeline.text_encoder, *options)


def sigma_sampling(config: TrainConfig, pipeline: QwenImagePipeline) -> SigmaSampling:
    return SigmaSampling(
        config.timestep_sampling, config.logit_mean, config.logit_std, config.timestep_shift, pipeline.schedule
    )


def seed_everything(config: TrainConfig) -> None:
    """Seed what draws from global generators (LoRA dropout alone) and make kernels deterministic if asked."""
    torch.manual_seed(config.seed)
    if config.deterministic:
        torch.use_deterministic_algorithms(True)
        torch.backends.cudnn.benchmark = False


def checkpointed_blocks(config: TrainConfig, transformer: QwenImageTransformer) -> int:
    """How many blocks recompute their activations in the backward pass; for auto the most there can be."""
    blocks = transformer.config.num_layers
    policy = config.activation_checkpointing
    if policy == "none":
        return 0
    if policy in ("full", "auto"):
        return blocks
    if int(policy) > blocks:
        raise ValueError(f"activation_checkpointing: {policy} blocks to recompute, but the model has {blocks}")
    return int(policy)
