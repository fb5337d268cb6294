"""Does the text encoder fit onto the GPU whole, or must its layers come from host memory one after the other?"""

import torch

from qwen_image.encoders.text_encoder import MAX_TOKENS, EncoderBytes
from qwen_image.free_memory import GIB, device_free_bytes, host_bytes
from qwen_image.loading.model_files import Component
from qwen_image.model.family import TEXT_TO_IMAGE, Member

MARGIN_BYTES, MARGIN_SHARE = GIB // 2, 0.04  # left free, for fragments and what libraries load yet
PICTURE_TOKENS = 2048  # of one image of 1024² 1,369; of three of 384² 567
TILE_BYTES = GIB // 2  # what the VAE takes for one tile of 256² besides weights; a guess above what was seen on a CPU


def streaming_line(
    text_encoder: Component,
    dtype: torch.dtype,
    tokens: int,
    device: torch.device,
    beside: int = 0,
    member: Member = TEXT_TO_IMAGE,
) -> str | None:
    """For people, where the layers have to be streamed for captions of so many tokens together; None: all of it fits.

    `beside`: bytes on the device of what is loaded next. `member`: of the family; an edit model's pictures are tokens too, but
    its prompts are encoded one at a time, and its vision tower always stays on the device. Raises ValueError where neither
    fits, before weights are read.
    """
    if device.type != "cuda":
        return None
    text, free = EncoderBytes.of(text_encoder, dtype, sees=member.most_sources > 0), device_free_bytes(device)
    if member.most_sources:
        tokens = PICTURE_TOKENS + MAX_TOKENS
    room = free - max(MARGIN_BYTES, int(MARGIN_SHARE * free)) - beside - tokens * text.token
    if text.whole <= room:
        return None
    if text.streamed > room or text.host > host_bytes():
        needed = text.streamed + free - room
        raise ValueError(
            f"the text encoder, its layers one after the other, takes {needed / GIB:.1f} GiB on the GPU and "
            f"{text.host / GIB:.1f} of host memory, but {free / GIB:.1f} and {host_bytes() / GIB:.1f} are free: end other "
            "programs, or make batches smaller"
        )
    return (
        f"text encoder: its layers come from host memory one after the other, {text.streamed / GIB:.1f} GiB on the GPU instead "
        f"of {text.whole / GIB:.1f}; {free / GIB:.1f} are free"
    )
