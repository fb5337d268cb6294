"""diffusers' LoRA step for Qwen-Image: as its training script does it, and as well as the library can be tuned."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from bench.peer import (
    LEARNING_RATE,
    LORA_RANK,
    LORA_TARGETS,
    Peer,
    Shape,
    Work,
    cached_sample,
    fresh_accelerator,
    lend,
    random_weights,
)
from qwen_image.model.sizes import LATENT_CHANNELS, PATCH, VAE_FACTOR

if TYPE_CHECKING:
    import torch


@contextlib.contextmanager
def diffusers(shape: Shape, work: Work, device: torch.device | str) -> Iterator[Peer]:
    """diffusers' `train_dreambooth_lora_qwen_image.py --mixed_precision bf16 --gradient_checkpointing --cache_latents`.

    The model runs under autocast though it is bfloat16 already; LoRA stays bfloat16 (the script raises it to float32
    for fp16 only). AdamW with weight decay 1e-4, gradients clipped at 1, constant rate; the loss is fetched every step.
    """
    import torch
    from diffusers import QwenImagePipeline
    from diffusers.models.autoencoders.vae import DiagonalGaussianDistribution
    from diffusers.optimization import get_scheduler
    from diffusers.training_utils import compute_density_for_timestep_sampling, compute_loss_weighting_for_sd3

    device = torch.device(device)
    transformer: Any = _diffusers_transformer(shape, device)
    transformer.enable_gradient_checkpointing()
    noise_scheduler = _diffusers_scheduler()
    latents, prompt = cached_sample(work, shape, device)
    moments = torch.cat([latents, torch.full_like(latents, -4.0)], dim=1).unsqueeze(2)  # mean, log-variance
    posterior = DiagonalGaussianDistribution(moments)
    latents_mean = torch.zeros(1, LATENT_CHANNELS, 1, 1, 1, device=device)
    latents_factor = torch.ones(1, LATENT_CHANNELS, 1, 1, 1, device=device)
    with fresh_accelerator(device, "bf16") as accelerator:
        trainable = [parameter for parameter in transformer.parameters() if parameter.requires_grad]
        optimizer: Any = torch.optim.AdamW([{"params": trainable, "lr": LEARNING_RATE}], weight_decay=1e-4, eps=1e-8)
        rate: Any = get_scheduler("constant", optimizer=optimizer)
        transformer, optimizer, rate = accelerator.prepare(transformer, optimizer, rate)
        transformer.train()

        def sigmas_of(timesteps: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
            sigmas = noise_scheduler.sigmas.to(device=device, dtype=like.dtype)
            schedule = noise_scheduler.timesteps.to(device)
            positions = [(schedule == timestep).nonzero().item() for timestep in timesteps]  # a sync for each image
            return sigmas[positions].flatten().view(-1, *[1] * (like.ndim - 1))

        def step() -> torch.Tensor:
            with accelerator.accumulate([transformer]):
                model_input = (posterior.sample() - latents_mean) * latents_factor
                model_input = model_input.to(dtype=torch.bfloat16)
                noise = torch.randn_like(model_input)
                density = compute_density_for_timestep_sampling(
                    weighting_scheme="none", batch_size=work.batch, logit_mean=0.0, logit_std=1.0, mode_scale=1.29
                )
                indices = (density * noise_scheduler.config.num_train_timesteps).long()
                timesteps = noise_scheduler.timesteps[indices].to(device=device)
                sigmas = sigmas_of(timesteps, model_input)
                noisy = (1.0 - sigmas) * model_input + sigmas * noise
                prediction = transformer(
                    hidden_states=_pack(noisy.permute(0, 2, 1, 3, 4), work),
                    encoder_hidden_states=prompt,
                    encoder_hidden_states_mask=None,  # encode_prompt returns None when no prompt is padded
                    timestep=timesteps / 1000,
                    img_shapes=_image_shapes(work),
                    return_dict=False,
                )[0]
                prediction = QwenImagePipeline._unpack_latents(prediction, work.height, work.width, VAE_FACTOR)
                weighting = compute_loss_weighting_for_sd3(weighting_scheme="none", sigmas=sigmas)
                target = noise - model_input
                error = weighting.float() * (prediction.float() - target.float()) ** 2
                loss = error.reshape(work.batch, -1).mean(1).mean()
                accelerator.backward(loss)
                accelerator.clip_grad_norm_(transformer.parameters(), 1.0)
                optimizer.step()
                rate.step()
                optimizer.zero_grad()
            loss.detach().item()  # the script logs every step
            return loss.detach()

        yield from lend(step, transformer, optimizer, ("diffusers", "peft", "accelerate", "torch"))


@contextlib.contextmanager
def diffusers_tuned(shape: Shape, work: Work, device: torch.device | str) -> Iterator[Peer]:
    """The same model with what a good engineer turns on: no checkpointing, no autocast, blocks compiled, cuDNN attention.

    Fused AdamW, clipping without a sync, σ drawn on the device. On a CPU the blocks are traced but not compiled
    (backend "eager"), with PyTorch's own choice of attention.
    """
    import torch
    from diffusers.models.attention_dispatch import attention_backend
    from diffusers.models.transformers.transformer_qwenimage import QwenImageTransformer2DModel

    device = torch.device(device)
    cuda = device.type == "cuda"
    with attention_backend("native"):  # set_attention_backend changes a global as well: put it back at the end
        transformer: Any = _diffusers_transformer(shape, device)
        assert isinstance(transformer, QwenImageTransformer2DModel)
        transformer.train()
        if cuda:
            transformer.set_attention_backend("_native_cudnn")
        transformer.compile_repeated_blocks(fullgraph=True, dynamic=False, backend="inductor" if cuda else "eager")
        trainable = [parameter for parameter in transformer.parameters() if parameter.requires_grad]
        optimizer = torch.optim.AdamW(trainable, lr=LEARNING_RATE, weight_decay=1e-4, fused=cuda)
        noise_scheduler = _diffusers_scheduler()
        timesteps, sigmas = noise_scheduler.timesteps.to(device), noise_scheduler.sigmas.to(device)
        latents, prompt = cached_sample(work, shape, device)

        def step() -> torch.Tensor:
            indices = torch.randint(len(timesteps), (work.batch,), device=device)
            sigma = sigmas[indices].to(latents.dtype).view(-1, 1, 1, 1)
            noise = torch.randn_like(latents)
            prediction = transformer(
                hidden_states=_pack((1.0 - sigma) * latents + sigma * noise, work),
                encoder_hidden_states=prompt,
                timestep=timesteps[indices] / 1000,
                img_shapes=_image_shapes(work),
                return_dict=False,
            )[0]
            loss = torch.nn.functional.mse_loss(prediction.float(), _pack(noise - latents, work).float())
            loss.backward()
            torch.nn.utils.clip_grad_norm_(trainable, 1.0)
            optimizer.step()
            optimizer.zero_grad()
            return loss.detach()

        try:
            yield from lend(step, transformer, optimizer, ("diffusers", "peft", "torch"))
        finally:
            torch._dynamo.reset()


def _diffusers_transformer(shape: Shape, device: torch.device) -> torch.nn.Module:
    """QwenImageTransformer2DModel, frozen, with a LoRA adapter as the script adds it."""
    import torch
    from diffusers import QwenImageTransformer2DModel
    from peft import LoraConfig

    sizes = {"num_layers": shape.layers, "num_attention_heads": shape.heads, "attention_head_dim": shape.head_dim}
    with torch.device("meta"):
        transformer = QwenImageTransformer2DModel(
            **sizes, joint_attention_dim=shape.joint_dim, axes_dims_rope=shape.rope_axes
        )
    transformer.pos_embed = type(transformer.pos_embed)(theta=10000, axes_dim=list(shape.rope_axes), scale_rope=True)
    random_weights(transformer, device)
    transformer.requires_grad_(False)
    transformer.add_adapter(
        LoraConfig(r=LORA_RANK, lora_alpha=LORA_RANK, init_lora_weights="gaussian", target_modules=list(LORA_TARGETS))
    )
    return transformer


def _diffusers_scheduler() -> Any:
    """Qwen-Image's scheduler_config.json with the script's `shift=3.0`, which dynamic shifting leaves without effect."""
    from diffusers import FlowMatchEulerDiscreteScheduler

    return FlowMatchEulerDiscreteScheduler(
        shift=3.0, use_dynamic_shifting=True, base_shift=0.5, max_shift=0.9, max_image_seq_len=8192, shift_terminal=0.02
    )


def _image_shapes(work: Work) -> list[tuple[int, int, int]]:
    return [(1, work.height // VAE_FACTOR // PATCH, work.width // VAE_FACTOR // PATCH)] * work.batch


def _pack(latents: torch.Tensor, work: Work) -> torch.Tensor:
    """[B, 16, H/8, W/8] (or with a frame axis of one) -> [B, H/16·W/16, 64]."""
    from diffusers import QwenImagePipeline

    return QwenImagePipeline._pack_latents(latents, *work.latent_shape)
