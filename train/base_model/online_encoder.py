"""Latents and prompt embeddings of a batch: taken from encoded shards, or made on the fly from images."""

from collections.abc import Sequence
from typing import Literal

import torch

from qwen_image.encoders.source_images import SourceImage
from qwen_image.encoders.text_encoder import TextEncoder
from qwen_image.encoders.vae import VAE, pixels_from_uint8
from qwen_image.model.conditioning import Prompt
from qwen_image.pipeline import QwenImagePipeline
from train.data.batch import STORED_DTYPE, Batch
from train.loader.from_config import RunData

# On the device, the text encoder's layers in host memory until they compute, on the CPU for good.
EncoderPlace = Literal["device", "swap", "cpu"]


class OnlineEncoder:
    """Latents and prompts of a batch on `device`: taken from it, or made on the fly when the shards hold images."""

    def __init__(
        self,
        vae: VAE | None,
        text_encoder: TextEncoder | None,
        max_prompt_tokens: int,
        text_padding: int,
        device: torch.device,
    ):
        self.vae = vae
        self.text_encoder = text_encoder
        self.device = device
        self.max_prompt_tokens = max_prompt_tokens
        self.text_padding = text_padding

    @classmethod
    def of(cls, pipeline: QwenImagePipeline, data: RunData) -> "OnlineEncoder":
        """Of the pipeline's encoders, if it has them."""
        options = data.options.max_prompt_tokens, data.text_padding, torch.device(data.reading.device)
        return cls(pipeline.vae, pipeline.text_encoder, *options)

    def __call__(self, batch: Batch) -> tuple[torch.Tensor, Prompt]:
        """Latents [B, 16, 1, H/8, W/8] and the padded prompt, both in STORED_DTYPE."""
        if batch.latents is not None:
            assert batch.prompt_embeds is not None
            return batch.latents, Prompt(batch.prompt_embeds, batch.prompt_mask, batch.sources)
        assert self.vae is not None, "image shards need both encoders"
        assert batch.pixels is not None
        latents = self.vae.encode(pixels_from_uint8(batch.pixels)).to(self.device, STORED_DTYPE)
        if batch.sources:
            embeds = self.encode_pictures(batch.captions, source_images(batch))
        else:
            embeds = self.encode_prompts(batch.captions)
        sources = tuple(
            self.vae.encode(pixels_from_uint8(each)).to(self.device, STORED_DTYPE) for each in batch.sources
        )
        return latents, Prompt.from_list([item.to(STORED_DTYPE) for item in embeds], self.text_padding, sources)

    def encode_prompts(self, captions: list[str]) -> list[torch.Tensor]:
        """One [T_i, D] a caption, on `device`."""
        assert self.text_encoder is not None, "no text encoder loaded"
        embeds = self.text_encoder.encode_list(captions, self.max_prompt_tokens)
        return [item.to(self.device) for item in embeds]

    def encode_pictures(self, captions: list[str], sources: Sequence[Sequence[SourceImage]]) -> list[torch.Tensor]:
        """The same for an edit model: of each instruction with its source images."""
        assert self.text_encoder is not None, "no text encoder loaded"
        prompts = [self.text_encoder.encode_pictures(*told) for told in zip(captions, sources, strict=True)]
        return [prompt.cut(self.max_prompt_tokens).to(self.device) for prompt in prompts]


def source_images(batch: Batch) -> list[list[SourceImage]]:
    """Of each sample of an image batch its source images, as the text encoder takes them."""
    places = [each.permute(0, 2, 3, 1).cpu().numpy() for each in batch.sources]
    return [
        [SourceImage(pixels[number], *size) for pixels, size in zip(places, sizes, strict=True)]
        for number, sizes in enumerate(batch.source_sizes)
    ]
