"""The parts of the drawing model, fresh or learned, and its folder in the Hugging Face layout."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from demo.drawing import denoiser
from demo.drawing.vae import fresh_vae
from demo.tiny_model import SCHEDULER_CONFIG, make_text_encoder, make_tokenizer, rotary_axes
from qwen_image.encoders.text_encoder import TextEncoder
from qwen_image.model.sizes import TransformerConfig
from qwen_image.model.transformer import QwenImageTransformer

if TYPE_CHECKING:
    from diffusers import AutoencoderKLQwenImage
    from transformers import Qwen2_5_VLForConditionalGeneration, Qwen2Tokenizer

VOCABULARY = 820  # 256 bytes, the template's words and the captions', and what these are merged from
SAVED_DTYPE = torch.float16


class Parts:
    """The model while it learns; `text_encoder` shares the weights of `text_model`."""

    def __init__(self, captions: list[str], seed: int, device: torch.device):
        self.tokenizer: Qwen2Tokenizer = make_tokenizer(captions, VOCABULARY)
        self.tokenizer.padding_side = "right"
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self.text_model: Qwen2_5_VLForConditionalGeneration = make_text_encoder(
                self.tokenizer, denoiser.TEXT_LAYERS, denoiser.TEXT_DIM
            )
        self.text_encoder = TextEncoder(self.tokenizer, self.text_model.model.language_model.to(device))
        self.vae: AutoencoderKLQwenImage = fresh_vae(seed).to(device)
        config = TransformerConfig(
            num_layers=denoiser.LAYERS,
            num_attention_heads=denoiser.HEADS,
            attention_head_dim=denoiser.HEAD_DIM,
            joint_attention_dim=denoiser.TEXT_DIM,
            axes_dims_rope=rotary_axes(denoiser.HEAD_DIM),
        )
        self.transformer: QwenImageTransformer = denoiser.fresh_transformer(config, device, seed)

    def write(self, folder: Path) -> Path:
        """All parts in SAVED_DTYPE, through diffusers' own classes; what is left here are the saved values in float32."""
        from diffusers import FlowMatchEulerDiscreteScheduler, QwenImagePipeline, QwenImageTransformer2DModel

        transformer = QwenImageTransformer2DModel(**asdict(self.transformer.config))
        transformer.load_state_dict(self.transformer.state_dict())
        parts: dict[str, Any] = {"transformer": transformer, "text_encoder": self.text_model, "vae": self.vae}
        pipeline = QwenImagePipeline(
            scheduler=FlowMatchEulerDiscreteScheduler(**SCHEDULER_CONFIG), tokenizer=self.tokenizer, **parts
        )
        device = self.vae.device
        pipeline.to("cpu", SAVED_DTYPE)
        pipeline.save_pretrained(folder)
        pipeline.to(device, torch.float32)
        return folder


@torch.no_grad()
def round_to_saved(module: torch.nn.Module) -> None:
    """Give the weights the values that they will have in the file."""
    for parameter in module.parameters():
        parameter.copy_(parameter.to(SAVED_DTYPE))


def bytes_of(folder: Path) -> int:
    """Size of all files of a folder."""
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
