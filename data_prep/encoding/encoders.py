"""The frozen encoders of one model on this rank's device: images to latents, captions to prompt embeddings."""

from __future__ import annotations

import os
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    import torch

    from qwen_image.encoders.source_images import SourceImage
    from qwen_image.encoders.text_encoder import TextEncoder
    from qwen_image.encoders.vae import VAE
    from qwen_image.loading.model_files import ModelFiles

VARIANT = "variant_embeds_"  # and its number, from 2: the embedding of another text of the same sample
CACHE_BYTES = 1 << 30  # embeddings of the latest captions on a rank: about 1,000 captions of 150 tokens


def device_of_rank() -> torch.device:
    import torch

    if not torch.cuda.is_available():
        return torch.device("cpu")
    return torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)) % torch.cuda.device_count())


def encoder_dtype(asked: str | None) -> str:
    """Name of the encoders' type on this rank's device."""
    return asked or ("bfloat16" if device_of_rank().type == "cuda" else "float32")


@dataclass
class Encoders:
    """VAE and text encoder of one model on this rank's device."""

    vae: VAE
    text_encoder: TextEncoder
    latent_std: bool
    empty_captions: bool = False  # of pairs: also the embedding of "" with their source images

    def __post_init__(self) -> None:
        self._cache: OrderedDict[str, torch.Tensor] = OrderedDict()
        self._cached = 0  # bytes
        self._counted: dict[str, int] = {}  # of the long captions that came lately

    @classmethod
    def load(
        cls,
        files: ModelFiles,
        dtype_name: str,
        latent_std: bool,
        empty_captions: bool = False,
        batch_size: int = 1,
        gpu_memory_limit: float | None = None,
    ) -> Encoders:
        """On this rank's device, the text encoder's layers in host memory where the device has no room for all of them.

        Raises ValueError where it has no room for that either, before weights are read.
        """
        import torch

        from qwen_image.encoders.encoder_room import TILE_BYTES, streaming_line
        from qwen_image.encoders.text_encoder import MAX_TOKENS, TextEncoder
        from qwen_image.encoders.vae import VAE
        from qwen_image.free_memory import limit_device

        device, dtype = device_of_rank(), getattr(torch, dtype_name)
        limit_device(device, gpu_memory_limit)
        vae = VAE.from_files(files["vae"], dtype, device)
        asked = files["text_encoder"], dtype, batch_size * MAX_TOKENS, device, TILE_BYTES, files.member
        line = streaming_line(*asked)
        if line is not None:
            print(f"{line} (each batch of captions moves all of them: a larger --batch_size moves them less often)")
        text_encoder = TextEncoder.of_model(files, dtype, device, streamed=line is not None)
        return cls(vae, text_encoder, latent_std, empty_captions)

    def encode_images(self, images: list[np.ndarray]) -> list[dict[str, torch.Tensor]]:
        """Per uint8 [H, W, 3] image: latent bf16 [16, H/8, W/8], and latent_std of that shape if asked."""
        import torch

        from qwen_image.encoders.vae import pixels_from_uint8

        pixels = torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2).to(self.vae.device, non_blocking=True)
        mode, std = self.vae.encode_moments(pixels_from_uint8(pixels))
        found = {"latent": mode} | ({"latent_std": std} if self.latent_std else {})
        stored = {name: tensor.squeeze(2).to(torch.bfloat16).cpu() for name, tensor in found.items()}
        return [{name: tensor[i].clone() for name, tensor in stored.items()} for i in range(len(images))]

    def encode_pair(
        self, instruction: str, sources: list[SourceImage], others: Sequence[str] = ()
    ) -> dict[str, torch.Tensor]:
        """Of an instruction with its source images: prompt_embeds bf16 [T, D], picture_tokens int32 [1] (how many of them
        stand before the instruction), source_latent_1 … bf16 [16, h, w], and empty_prompt_embeds if asked; variant_embeds_2 …
        of `others`, further instructions for the same images."""
        import torch

        from qwen_image.pipeline import encode_sources

        prompt = self.text_encoder.encode_pictures(instruction, sources)
        found = {"prompt_embeds": prompt.embeds}
        for number, other in enumerate(others, start=2):
            found[f"{VARIANT}{number}"] = self.text_encoder.encode_pictures(other, sources).embeds
        if self.empty_captions:
            found["empty_prompt_embeds"] = self.text_encoder.encode_pictures("", sources).embeds
        for number, latent in enumerate(encode_sources(self.vae, [sources]), start=1):
            found[f"source_latent_{number}"] = latent[0].squeeze(1)
        stored = {name: tensor.to("cpu", torch.bfloat16).clone() for name, tensor in found.items()}
        return stored | {"picture_tokens": torch.tensor([prompt.picture_tokens], dtype=torch.int32)}

    def encode_captions(self, captions: list[str], batch_size: int) -> dict[str, torch.Tensor]:
        """bf16 [T, D] of each caption, on the CPU; one that came lately is not encoded again.

        Captions of similar length are encoded together. In bfloat16 their company may change an embedding's last bit.
        """
        import torch

        unknown = sorted(set(captions) - self._cache.keys(), key=lambda caption: (len(caption), caption))
        for start in range(0, len(unknown), batch_size):
            batch = unknown[start : start + batch_size]
            for caption, embeds in zip(batch, self.text_encoder.encode_list(batch), strict=True):
                self._cache[caption] = embeds.to("cpu", torch.bfloat16).clone()
                self._cached += self._cache[caption].nbytes
        for caption in captions:
            self._cache.move_to_end(caption)
        found = {caption: self._cache[caption] for caption in captions}
        while self._cached > CACHE_BYTES:
            self._cached -= self._cache.popitem(last=False)[1].nbytes
        return found

    def tokens_of(self, caption: str) -> int:
        """Tokens of the whole caption and the template's end, of which MAX_TOKENS are encoded; 0 where it is surely shorter."""
        from qwen_image.encoders.text_encoder import MAX_TOKENS

        if len(caption.encode()) <= MAX_TOKENS:  # a token is at least a byte
            return 0
        if caption not in self._counted:
            if len(self._counted) > 1000:
                self._counted.clear()
            whole = self.text_encoder.tokenizer(self.text_encoder.member.template.format(caption)).input_ids
            self._counted[caption] = len(whole) - self.text_encoder.template_drop
        return self._counted[caption]

    def empty_prompt(self) -> bytes:
        """The embedding of the empty caption as a safetensors file: what caption dropout trains with."""
        import safetensors.torch

        return safetensors.torch.save({"prompt_embeds": self.encode_captions([""], 1)[""]})
