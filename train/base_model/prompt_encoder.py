"""The text encoder for the options' own prompts (sample images, class prompts): there already, or loaded for a while."""

import gc
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from qwen_image.loading.model_files import ModelSource, resolve_model
from qwen_image.pipeline import QwenImagePipeline
from train.base_model.online_encoder import OnlineEncoder


@contextmanager
def prompt_encoder(
    pipeline: QwenImagePipeline,
    encoder: OnlineEncoder,
    source: ModelSource,
    dtype: torch.dtype,
    components: tuple[str, ...],
) -> Iterator[OnlineEncoder]:
    """`encoder`; where it has no text encoder, as the shards are encoded, one with the `components` that prompts need, if any.

    Then its text encoder is released at the end, and its VAE, which sample images alone need, waits on the CPU.
    """
    if pipeline.text_encoder is not None or not components:
        yield encoder
        return
    loaded = QwenImagePipeline.from_pretrained(
        source,
        components=components,
        dtype=dtype,
        device=encoder.device,
        stream_text_encoder=encoder.device.type == "cuda",  # the transformer is there already
    )
    if loaded.vae is not None:
        loaded.vae.to("cpu")
    own = OnlineEncoder(
        loaded.vae, loaded.text_encoder, encoder.max_prompt_tokens, encoder.text_padding, encoder.device
    )
    del loaded
    try:
        yield own
    finally:
        own.text_encoder = None
        gc.collect()  # its hooks refer to it


def check_prompt_encoder(source: ModelSource, components: tuple[str, ...]) -> None:
    """Raise FileNotFoundError, before weights are read, where prompts need `components` that the model's files lack."""
    if components:
        try:
            resolve_model(source, (*components, "tokenizer"))
        except FileNotFoundError as error:
            raise FileNotFoundError(f"sample_prompts and prior_prompt need the model's text encoder: {error}") from None
