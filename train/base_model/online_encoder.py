"""Latents and prompt embeddings of a batch: taken from encoded shards, or made on the fly from images."""

from contextlib import nullcontext
from typing import Literal

import torch

from qwen_image.encoders.text_encoder import TextEncoder
from qwen_image.encoders.vae import VAE, pixels_from_uint8
from qwen_image.loading.pinned_memory import lent
from qwen_image.model.conditioning import Prompt
from qwen_image.pipeline import QwenImagePipeline
from train.data.batch import STORED_DTYPE, Batch
from train.data.from_config import RunData

EncoderPlace = Literal["device", "swap", "cpu"]  # on the device, in host memory but lent to it, on the CPU for good


class OnlineEncoder:
    """Latents and prompts of a batch on `device`: taken from it, or made on the fly when the shards hold images.

    `swap`: the text encoder lives in host memory and is on the device only while it encodes.
    """

    def __init__(
        self,
        vae: VAE | None,
        text_encoder: TextEncoder | None,
        max_prompt_tokens: int,
        text_padding: int,
        device: torch.device,
        swap: bool = False,
    ):
        self.vae = vae
        self.text_encoder = text_encoder
        self.device = device
        self.swap = swap
        self.max_prompt_tokens = max_prompt_tokens
        self.text_padding = text_padding

    @classmethod
    def of(cls, pipeline: QwenImagePipeline, data: RunData, place: EncoderPlace) -> "OnlineEncoder":
        """Of the pipeline's encoders, if it has them, which lie at `place`."""
        options = data.options.max_prompt_tokens, data.text_padding, torch.device(data.reading.device)
        return cls(pipeline.vae, pipeline.text_encoder, *options, swap=place == "swap")

    def __call__(self, batch: Batch) -> tuple[torch.Tensor, Prompt]:
        """Latents [B, 16, 1, H/8, W/8] and the padded prompt, both in STORED_DTYPE."""
        if batch.latents is not None:
            assert batch.prompt_embeds is not None
            return batch.latents, Prompt(batch.prompt_embeds, batch.prompt_mask)
        assert self.vae is not None, "image shards need both encoders"
        assert batch.pixels is not None
        latents = self.vae.encode(pixels_from_uint8(batch.pixels)).to(self.device, STORED_DTYPE)
        embeds = self.encode_prompts(batch.captions)
        return latents, Prompt.from_list([item.to(STORED_DTYPE) for item in embeds], self.text_padding)

    def encode_prompts(self, captions: list[str]) -> list[torch.Tensor]:
        """One [T_i, D] a caption, on `device`."""
        assert self.text_encoder is not None, "no text encoder loaded"
        with lent(self.text_encoder.language_model, self.device) if self.swap else nullcontext():
            embeds = self.text_encoder.encode_list(captions, self.max_prompt_tokens)
        return [item.to(self.device) for item in embeds]
