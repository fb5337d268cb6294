"""What DeepSpeed wraps: a module whose forward takes a batch and returns the loss."""

from contextlib import nullcontext

import torch
from torch import nn

from qwen_image.pipeline import pack_latents, predict_velocity
from qwen_image.text_encoder import Prompt, TextEncoder
from qwen_image.transformer import QwenImageTransformer
from qwen_image.vae import VAE, pixels_from_uint8
from train.data import Batch
from train.flow import WeightingName, add_noise, flow_matching_loss, loss_weight, velocity_target
from train.host_memory import lent

# Encoded shards store latents and prompt embeddings in this type; encoding online rounds alike, so both give one loss.
STORED_DTYPE = torch.bfloat16


class FlowMatchingModule(nn.Module):
    """The transformer and its loss: the training step in five lines, with inference's own `predict_velocity`."""

    def __init__(self, transformer: QwenImageTransformer, weighting: WeightingName, dtype: torch.dtype):
        super().__init__()
        self.transformer = transformer
        self.weighting = weighting
        self.dtype = dtype

    def forward(self, latents: torch.Tensor, noise: torch.Tensor, sigma: torch.Tensor, prompt: Prompt) -> torch.Tensor:
        """latents and noise [B, 16, 1, H/8, W/8], σ [B] on the CPU → each sample's weighted loss, float32 [B]."""
        rows, columns = latents.shape[-2] // 2, latents.shape[-1] // 2
        on_device = sigma.to(latents.device, non_blocking=True)
        noised = pack_latents(add_noise(latents, noise, on_device)).to(self.dtype)
        prediction = predict_velocity(self.transformer, noised, sigma, prompt, rows, columns)
        target = pack_latents(velocity_target(latents, noise))
        return flow_matching_loss(prediction, target, loss_weight(self.weighting, on_device))


class OnlineEncoder:
    """Latents and prompts of a batch on `device`: taken from it, or made on the fly when the shards hold images.

    `swap`: the text encoder lives in host memory and is on the device only while it encodes.
    """

    def __init__(
        self,
        vae: VAE | None,
        text_encoder: TextEncoder | None,
        max_prompt_tokens: int,
        text_multiple: int,
        device: torch.device,
        swap: bool = False,
    ):
        self.vae = vae
        self.text_encoder = text_encoder
        self.device = device
        self.swap = swap
        self.max_prompt_tokens = max_prompt_tokens
        self.text_multiple = text_multiple

    def __call__(self, batch: Batch) -> tuple[torch.Tensor, Prompt]:
        """Latents [B, 16, 1, H/8, W/8] and the padded prompt, both in STORED_DTYPE."""
        if batch.latents is not None:
            assert batch.prompt_embeds is not None
            return batch.latents, Prompt(batch.prompt_embeds, batch.prompt_mask)
        assert self.vae is not None, "image shards need both encoders"
        assert batch.pixels is not None
        latents = self.vae.encode(pixels_from_uint8(batch.pixels)).to(self.device, STORED_DTYPE)
        embeds = self.encode_prompts(batch.captions)
        return latents, Prompt.from_list([item.to(STORED_DTYPE) for item in embeds], self.text_multiple)

    def encode_prompts(self, captions: list[str]) -> list[torch.Tensor]:
        """One [T_i, D] a caption, on `device`."""
        assert self.text_encoder is not None, "no text encoder loaded"
        with lent(self.text_encoder.language_model, self.device) if self.swap else nullcontext():
            embeds = self.text_encoder.encode_list(captions, self.max_prompt_tokens)
        return [item.to(self.device) for item in embeds]
