"""Captions to prompt embeddings, exactly as Qwen-Image's inference pipeline makes them (diffusers 0.42.1).

The hidden states of a language model, after its last norm, are what the transformer attends to. The caption goes into a fixed
chat template, through Qwen2.5-VL's language model, and the tokens that the template puts before the caption are dropped. The
five tokens after the caption stay, so "" has five tokens.
"""

import re
from typing import Any, NamedTuple

import torch

from files.json_object import read_json_object
from files.shown import shown
from qwen_image.encoders.streamed_layers import EMBEDDING, LAYERS, SLOTS, StreamedLayers
from qwen_image.loading.model_files import Component
from qwen_image.loading.safetensors_ranges import read_headers
from qwen_image.loading.weights import load_weights, match_weights
from qwen_image.model.conditioning import Prompt

TEMPLATE = (
    "<|im_start|>system\nDescribe the image by detailing the color, shape, size, texture, quantity, text, spatial "
    "relationships of the objects and background:<|im_end|>\n<|im_start|>user\n{}<|im_end|>\n<|im_start|>assistant\n"
)
MODEL_TYPE = "qwen2_5_vl"
# What the language model's weights are called in checkpoints of transformers 5 and 4, in ComfyUI's file, and alone.
_LANGUAGE_MODEL = re.compile(r"^(model\.language_model\.|language_model\.model\.|model\.(?!visual\.)|)")
_OTHER_PARTS = ("visual.", "model.visual.", "lm_head.", "language_model.lm_head.")  # vision tower, vocabulary head
MAX_TOKENS = 1024  # of caption plus template end; sampling uses 512 by default


def language_model_name(name: str) -> str | None:
    """A tensor's name in a checkpoint of Qwen2.5-VL → its name in the language model; None for the other parts."""
    return None if name.startswith(_OTHER_PARTS) else _LANGUAGE_MODEL.sub("", name, count=1)


class TextEncoder:
    """Tokenizer and language model of Qwen2.5-VL. The vision tower and the vocabulary head are not kept in memory.

    `streamed`: brings the layers to the device, where they don't stay there.
    """

    def __init__(self, tokenizer: Any, language_model: Any, streamed: StreamedLayers | None = None):
        self.tokenizer, self.streamed = tokenizer, streamed
        self.language_model = language_model.eval().requires_grad_(False)
        before_caption = TEMPLATE.partition("{}")[0]
        self.template_drop = len(tokenizer(before_caption).input_ids)  # 34 with Qwen's tokenizer

    @classmethod
    def from_files(
        cls,
        text_encoder: Component,
        tokenizer: Component,
        dtype: torch.dtype,
        device: torch.device | str,
        streamed: bool = False,
    ) -> "TextEncoder":
        """Load the language model by the transformer's own reader; the file's other parts are left where they are.

        `streamed`: its layers lie in host memory and come one after the other (qwen_image/encoders/streamed_layers.py).

        Raises FileNotFoundError without a configuration, and ValueError when configuration, names, shapes or the tokenizer
        are another model's, before any weight is read.
        """
        from transformers import AutoTokenizer, Qwen2_5_VLConfig, Qwen2_5_VLTextModel

        config_file = text_encoder.folder / "config.json"
        if not config_file.is_file():
            raise FileNotFoundError(
                f"{config_file} is missing; the text encoder is Qwen2.5-VL in the Hugging Face layout"
            )
        kind = read_json_object(config_file).get("model_type")
        if kind != MODEL_TYPE:
            raise ValueError(
                f"{shown(config_file)} says model_type {shown(repr(kind))}; the text encoder is a {MODEL_TYPE}"
            )
        config = Qwen2_5_VLConfig.from_pretrained(text_encoder.folder).text_config
        words = AutoTokenizer.from_pretrained(tokenizer.folder, padding_side="right")
        if len(words) > config.vocab_size:
            raise ValueError(
                f"{shown(tokenizer.folder)} has {len(words)} tokens, the text encoder knows {config.vocab_size}: tokenizer and "
                "text encoder belong to different models"
            )
        with torch.device("meta"):
            language_model = Qwen2_5_VLTextModel(config)
        match_weights(language_model, text_encoder.weights, language_model_name, unscaled_float8=False)
        layers = StreamedLayers(language_model, dtype, torch.device(device)) if streamed else None
        room = None if layers is None else layers.room
        load_weights(language_model, text_encoder.weights, dtype, device, rename=language_model_name, room=room)
        if layers is not None:
            layers.begin()
        rotary: Any = type(language_model.rotary_emb)  # its frequencies are computed, not stored, and were on "meta"
        language_model.rotary_emb = rotary(config).to(device)
        return cls(words, language_model, layers)

    @property
    def device(self) -> torch.device:
        return next(self.language_model.parameters()).device if self.streamed is None else self.streamed.device

    def tokenize(self, captions: list[str]) -> tuple[torch.Tensor, torch.Tensor]:
        """Token ids and attention mask, each int64 [B, L], template included; longer captions are cut at 1024 tokens."""
        tokens = self.tokenizer(
            [TEMPLATE.format(caption) for caption in captions],
            max_length=MAX_TOKENS + self.template_drop,
            padding=True,
            truncation=True,
            return_tensors="pt",
        )
        return tokens.input_ids, tokens.attention_mask

    @torch.no_grad()
    def encode_list(self, captions: list[str], max_tokens: int = MAX_TOKENS) -> list[torch.Tensor]:
        """One [T_i, D] tensor a caption, T_i ≤ max_tokens, without padding."""
        if not 1 <= max_tokens <= MAX_TOKENS:
            raise ValueError(f"max_tokens must lie between 1 and {MAX_TOKENS}, got {max_tokens}")
        input_ids, attention_mask = self.tokenize(captions)
        table = self.language_model.embed_tokens  # may have stayed in host memory
        embeds = table(input_ids.to(table.weight.device)).to(self.device)
        hidden = self.language_model(
            inputs_embeds=embeds, attention_mask=attention_mask.to(self.device), use_cache=False
        ).last_hidden_state
        lengths = attention_mask.sum(1).tolist()
        end = self.template_drop + max_tokens
        return [row[self.template_drop : min(length, end)] for row, length in zip(hidden, lengths, strict=True)]

    def encode(self, captions: list[str], max_tokens: int = MAX_TOKENS) -> Prompt:
        """Embeddings [B, T, D] and mask of a batch of captions."""
        return Prompt.from_list(self.encode_list(captions, max_tokens))


class EncoderBytes(NamedTuple):
    """What the language model takes: whole on the device, or streamed there and in host memory; work for a caption's token."""

    whole: int
    streamed: int
    host: int
    token: int

    @classmethod
    def of(cls, text_encoder: Component, dtype: torch.dtype) -> "EncoderBytes":
        """From the headers of its files; reads no weights."""
        whole = table = width = 0
        layers: dict[str, int] = {}
        for stored_name, stored in read_headers(text_encoder.weights).items():
            name = language_model_name(stored_name)
            if name is None:
                continue
            size = stored.numel * dtype.itemsize
            whole += size
            if name == EMBEDDING:
                table = size
            elif name.startswith(LAYERS):
                layer = name.split(".")[1]
                layers[layer] = layers.get(layer, 0) + size
                width = max(width, *stored.shape)
        slots = SLOTS * max(layers.values(), default=0)
        # The MLP's three tensors and what attention makes of a token, none of which is kept.
        return cls(whole, whole - table - sum(layers.values()) + slots, whole, 5 * width * dtype.itemsize)
