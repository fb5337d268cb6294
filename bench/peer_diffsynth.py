"""DiffSynth-Studio's LoRA step for Qwen-Image, through its own pipeline, training module and loss."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from bench.peer import (
    LEARNING_RATE,
    LORA_RANK,
    LORA_TARGETS,
    TIMESTEP_CHANNELS,
    Peer,
    Shape,
    Work,
    cached_sample,
    fresh_accelerator,
    lend,
    random_weights,
)
from qwen_image.model.sizes import LATENT_CHANNELS

if TYPE_CHECKING:
    import torch


@contextlib.contextmanager
def diffsynth(shape: Shape, work: Work, device: torch.device | str) -> Iterator[Peer]:
    """DiffSynth-Studio's second stage of split training (`--task sft:train`): its pipeline, LoRA injection and loss.

    `--use_gradient_checkpointing` as in all its LoRA scripts, no autocast (`accelerate launch` without configuration),
    AdamW with weight decay 0.01, ConstantLR, no clipping. Raises ValueError for batch > 1: its model unpacks one image.
    """
    if work.batch != 1:
        raise ValueError(f"DiffSynth-Studio trains on one image at a time, batch is {work.batch}: use batch 1")
    import torch
    from diffsynth.diffusion import DiffusionTrainingModule, FlowMatchSFTLoss
    from diffsynth.pipelines.qwen_image import QwenImagePipeline

    class TrainingModule(DiffusionTrainingModule):
        def __init__(self, pipe: QwenImagePipeline) -> None:
            super().__init__()
            self.pipe = self.split_pipeline_units("sft:train", pipe, lora_base_model="dit")
            targets = ",".join(LORA_TARGETS)
            self.switch_pipe_to_training_mode(
                pipe, lora_base_model="dit", lora_target_modules=targets, lora_rank=LORA_RANK, task="sft:train"
            )

        def forward(self, data: dict[str, Any], inputs: tuple[dict[str, Any], ...]) -> torch.Tensor:
            inputs = self.transfer_data_to_device(inputs, self.pipe.device, self.pipe.torch_dtype)
            for unit in self.pipe.units:  # none is left in sft:train
                inputs = self.pipe.unit_runner(unit, self.pipe, *inputs)
            shared, positive, _ = inputs
            return FlowMatchSFTLoss(self.pipe, **shared, **positive)

    device = torch.device(device)
    pipe = QwenImagePipeline(device=device, torch_dtype=torch.bfloat16)
    pipe.dit = _diffsynth_transformer(shape, device)
    module: Any = TrainingModule(pipe)
    with fresh_accelerator(device, "no") as accelerator:
        optimizer: Any = torch.optim.AdamW(module.trainable_modules(), lr=LEARNING_RATE, weight_decay=0.01)
        scheduler: Any = torch.optim.lr_scheduler.ConstantLR(optimizer)
        module.to(device=accelerator.device)
        module, optimizer, scheduler = accelerator.prepare(module, optimizer, scheduler)
        latents, prompt = cached_sample(work, shape, device)
        cached: tuple[dict[str, Any], ...] = (
            {
                "input_latents": latents,
                "latents": torch.randn_like(latents),
                "height": work.height,
                "width": work.width,
                "cfg_scale": 1,
                "use_gradient_checkpointing": True,
                "use_gradient_checkpointing_offload": False,
            },
            {
                "prompt_emb": prompt,
                "prompt_emb_mask": torch.ones(prompt.shape[:2], dtype=torch.long, device=device),
            },
            {},
        )

        def step() -> torch.Tensor:
            with accelerator.accumulate(module):
                loss = module({}, inputs=tuple(dict(part) for part in cached))
                accelerator.backward(loss)
                optimizer.step()
                scheduler.step()
                optimizer.zero_grad()
            return loss.detach()

        yield from lend(step, module, optimizer, ("diffsynth", "peft", "accelerate", "torch"))


def _diffsynth_transformer(shape: Shape, device: torch.device) -> torch.nn.Module:
    """Its QwenImageDiT; the class fixes all sizes but the number of blocks, so other ones are put in part by part."""
    import torch
    from diffsynth.models.general_modules import AdaLayerNorm, RMSNorm, TimestepEmbeddings
    from diffsynth.models.qwen_image_dit import QwenEmbedRope, QwenImageDiT, QwenImageTransformerBlock

    with torch.device("meta"):
        dit = QwenImageDiT(num_layers=shape.layers)
        width = shape.width
        if (width, shape.heads, shape.joint_dim) != (3072, 24, 3584):
            dit.time_text_embed = TimestepEmbeddings(
                TIMESTEP_CHANNELS, width, diffusers_compatible_format=True, scale=1000, align_dtype_to_timestep=False
            )
            dit.txt_norm = RMSNorm(shape.joint_dim, eps=1e-6)
            dit.img_in = torch.nn.Linear(4 * LATENT_CHANNELS, width)
            dit.txt_in = torch.nn.Linear(shape.joint_dim, width)
            blocks = [QwenImageTransformerBlock(width, shape.heads, shape.head_dim) for _ in range(shape.layers)]
            dit.transformer_blocks = torch.nn.ModuleList(blocks)
            dit.norm_out = AdaLayerNorm(width, single=True)
            dit.proj_out = torch.nn.Linear(width, 4 * LATENT_CHANNELS)
    dit.pos_embed = QwenEmbedRope(theta=10000, axes_dim=list(shape.rope_axes), scale_rope=True)  # real, not meta
    return random_weights(dit, device)
