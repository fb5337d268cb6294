"""diffusers' own edit pipelines over a tiny model, with transformers' own processor, which here needs a detour: no torchvision.

As installed, these pipelines don't give the text encoder what it computes the pictures' grid positions from (diffusers' issue
14194); `pipeline_of(..., repaired=True)` does.
"""

from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import (
    AutoencoderKLQwenImage,
    FlowMatchEulerDiscreteScheduler,
    QwenImageEditPipeline,
    QwenImageEditPlusPipeline,
    QwenImageTransformer2DModel,
)
from PIL import Image
from transformers import AutoTokenizer, Qwen2_5_VLForConditionalGeneration, Qwen2VLProcessor
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil


def processor_of(folder: Path) -> Qwen2VLProcessor:
    """Qwen2VLProcessor without its video processor, which is what can't be built; the rest of it is untouched."""
    processor = Qwen2VLProcessor.__new__(Qwen2VLProcessor)
    tokenizer = AutoTokenizer.from_pretrained(folder / "tokenizer", padding_side="right")
    processor.tokenizer, processor.chat_template = tokenizer, None
    processor.image_processor = Qwen2VLImageProcessorPil.from_pretrained(folder / "processor")
    processor.image_token, processor.video_token = "<|image_pad|>", "<|video_pad|>"
    processor.image_token_id, processor.video_token_id = tokenizer.convert_tokens_to_ids(
        ["<|image_pad|>", "<|video_pad|>"]
    )
    return processor


def repair(text_encoder: Any) -> None:
    """Tell the text encoder which tokens are a picture's, as transformers 4 found out by itself."""
    plain = text_encoder.forward

    def forward(input_ids=None, **arguments):
        return plain(
            input_ids=input_ids, mm_token_type_ids=(input_ids == text_encoder.config.image_token_id).int(), **arguments
        )

    text_encoder.forward = forward


def pipeline_of(folder: Path, plus: bool, repaired: bool):
    text_encoder = Qwen2_5_VLForConditionalGeneration.from_pretrained(folder / "text_encoder", dtype=torch.float32)
    if repaired:
        repair(text_encoder)
    pipeline = (QwenImageEditPlusPipeline if plus else QwenImageEditPipeline)(
        scheduler=FlowMatchEulerDiscreteScheduler.from_pretrained(folder / "scheduler"),
        vae=AutoencoderKLQwenImage.from_pretrained(folder / "vae"),
        text_encoder=text_encoder.eval(),
        tokenizer=AutoTokenizer.from_pretrained(folder / "tokenizer"),
        processor=processor_of(folder),
        transformer=QwenImageTransformer2DModel.from_pretrained(folder / "transformer"),
    )
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def picture(width: int, height: int, seed: int = 0) -> Image.Image:
    """Smooth colors with edges."""
    generator = np.random.default_rng(seed)
    coarse = Image.fromarray(generator.integers(0, 256, (5, 7, 3), dtype=np.uint8)).resize((width, height))
    pixels = np.asarray(coarse).copy()
    pixels[height // 3 : height // 2, width // 4 : width // 2] = generator.integers(0, 256, 3)
    return Image.fromarray(pixels)
