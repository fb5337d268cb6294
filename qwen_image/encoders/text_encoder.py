"""Captions, and the source images they speak of, to prompt embeddings, as Qwen-Image's pipelines make them (diffusers 0.42.1).

The hidden states of a language model, after its last norm, are what the transformer attends to. The caption goes into a fixed
chat template, through Qwen2.5-VL's language model, and the tokens that the template puts before the caption are dropped. The
five tokens after the caption stay, so "" has five tokens.

For the edit models the vision tower turns each source image into tokens (one for 28 × 28 pixels) that stand before the
instruction. Where these tokens are for the language model's rotary positions is a matter of its own: it was trained with them
on a grid (multimodal RoPE), and so ComfyUI, DiffSynth-Studio and diffusers with transformers 4 have them. diffusers 0.42.1 with
transformers 5 doesn't pass on what the grid is computed from, and its positions are those of plain text (its issue 14194):
`--picture_positions consecutive` does the same.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch

from files.json_object import read_json_object
from files.shown import shown
from qwen_image.encoders.source_images import SourceImage, seen_by_text_encoder
from qwen_image.encoders.streamed_layers import EMBEDDING, LAYERS, SLOTS, StreamedLayers
from qwen_image.loading.model_files import Component, ModelFiles
from qwen_image.loading.safetensors_ranges import read_headers
from qwen_image.loading.weights import load_weights, match_weights
from qwen_image.model.conditioning import Prompt
from qwen_image.model.family import TEXT_TO_IMAGE, Member

TEMPLATE = TEXT_TO_IMAGE.template
PICTURE_PAD = "<|image_pad|>"
PICTURE_END = "<|vision_end|>"
PICTURE_SIDE = 28  # pixels of a picture that become one token, on each side
PICTURE_MARKS = ("Picture", " 1", ":", "<|vision_start|>", "<|vision_end|>")  # about what stands around its tokens
PicturePositions = Literal["grid", "consecutive"]
PIXELS_OF_PICTURES = {
    "shortest_edge": 56 * 56,
    "longest_edge": 12_845_056,
}  # areas, of Qwen2.5-VL's preprocessor_config.json
MODEL_TYPE = "qwen2_5_vl"
# What the language model's weights are called in checkpoints of transformers 5 and 4, in ComfyUI's file, and alone.
_LANGUAGE_MODEL = re.compile(r"^(model\.language_model\.|language_model\.model\.|model\.(?!visual\.)|)")
_OTHER_PARTS = ("visual.", "model.visual.", "lm_head.", "language_model.lm_head.")  # vision tower, vocabulary head
_VISION_TOWER = re.compile(r"^(model\.)?visual\.")
MAX_TOKENS = 1024  # of caption plus template end; sampling uses 512 by default


def language_model_name(name: str) -> str | None:
    """A tensor's name in a checkpoint of Qwen2.5-VL → its name in the language model; None for the other parts."""
    return None if name.startswith(_OTHER_PARTS) else _LANGUAGE_MODEL.sub("", name, count=1)


def whole_model_name(name: str) -> str | None:
    """The same for the model with its vision tower, whose parts are `language_model` and `visual`."""
    if _VISION_TOWER.match(name):
        return _VISION_TOWER.sub("visual.", name, count=1)
    own = language_model_name(name)
    return None if own is None else f"language_model.{own}"


class PicturePrompt(NamedTuple):
    """The embeddings of an instruction with its pictures, [T, D]; the first `picture_tokens` of them are the pictures'."""

    embeds: torch.Tensor
    picture_tokens: int

    def cut(self, max_tokens: int) -> torch.Tensor:
        """The pictures whole, and of instruction and template end at most `max_tokens`."""
        return self.embeds[: self.picture_tokens + max_tokens]


@dataclass(frozen=True)
class Vision:
    """What an edit model's text encoder has besides: the whole of Qwen2.5-VL's trunk, and what prepares pictures for it."""

    model: Any  # Qwen2_5_VLModel
    processor: Any  # Qwen2VLImageProcessorPil
    positions: PicturePositions


class TextEncoder:
    """Tokenizer and language model of Qwen2.5-VL; for edit models its vision tower. The vocabulary head is not kept.

    Attributes:
        member: of the family, whose template it is.
        template_drop: tokens of the template before pictures and caption, which are dropped: 34, for edits 64.
        vision: None for text to image.
        streamed: brings the layers to the device, where they don't stay there.
    """

    def __init__(
        self,
        tokenizer: Any,
        language_model: Any,
        streamed: StreamedLayers | None = None,
        member: Member = TEXT_TO_IMAGE,
        vision: Vision | None = None,
    ):
        self.tokenizer, self.streamed = tokenizer, streamed
        self.member, self.vision = member, vision
        self.language_model = language_model.eval().requires_grad_(False)
        self.template_drop = len(tokenizer(member.prefix).input_ids)
        if vision is not None:
            vision.model.eval().requires_grad_(False)

    @classmethod
    def of_model(
        cls, files: ModelFiles, dtype: torch.dtype, device: torch.device | str, streamed: bool = False
    ) -> "TextEncoder":
        """As `from_files`, of a model's files: an edit model's comes with its vision tower."""
        parts = files["text_encoder"], files["tokenizer"], dtype, device
        return cls.from_files(*parts, streamed, files.member, files.preprocessor, files.picture_positions)

    @classmethod
    def from_files(
        cls,
        text_encoder: Component,
        tokenizer: Component,
        dtype: torch.dtype,
        device: torch.device | str,
        streamed: bool = False,
        member: Member = TEXT_TO_IMAGE,
        preprocessor: Path | None = None,
        picture_positions: PicturePositions = "grid",
    ) -> "TextEncoder":
        """Load the language model, for an edit `member` with its vision tower, by the transformer's own reader.

        The file's other parts are left where they are. `preprocessor`: preprocessor_config.json; None: Qwen2.5-VL's own.
        `streamed`: the layers lie in host memory and come one after the other (qwen_image/encoders/streamed_layers.py).

        Raises FileNotFoundError without a configuration, and ValueError when configuration, names, shapes or the tokenizer
        are another model's, before any weight is read.
        """
        from transformers import AutoTokenizer, Qwen2_5_VLConfig, Qwen2_5_VLModel, Qwen2_5_VLTextModel

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
        whole = Qwen2_5_VLConfig.from_pretrained(text_encoder.folder)
        config = whole.text_config
        words = AutoTokenizer.from_pretrained(tokenizer.folder, padding_side="right")
        if len(words) > config.vocab_size:
            raise ValueError(
                f"{shown(tokenizer.folder)} has {len(words)} tokens, the text encoder knows {config.vocab_size}: tokenizer and "
                "text encoder belong to different models"
            )
        sees = member.most_sources > 0
        with torch.device("meta"):
            model: Any = Qwen2_5_VLModel(whole) if sees else Qwen2_5_VLTextModel(config)
        language_model, rename = (model.language_model, whole_model_name) if sees else (model, language_model_name)
        match_weights(model, text_encoder.weights, rename, unscaled_float8=False)
        layers = StreamedLayers(language_model, dtype, torch.device(device)) if streamed else None

        def room(name: str, shape: torch.Size) -> torch.Tensor | None:
            own = name.removeprefix("language_model.")
            return None if layers is None or (sees and own == name) else layers.room(own, shape)

        load_weights(model, text_encoder.weights, dtype, device, rename=rename, room=room)
        if layers is not None:
            layers.begin()
        # Frequencies of rotary positions are computed, not stored, and were on "meta".
        language_model.rotary_emb = type(language_model.rotary_emb)(config).to(device)
        if not sees:
            return cls(words, language_model, layers)
        model.visual.rotary_pos_emb = type(model.visual.rotary_pos_emb)(whole.vision_config).to(device)
        vision = Vision(model, picture_processor(preprocessor), picture_positions)
        return cls(words, language_model, layers, member, vision)

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
        self.member.check_sources(0, "a prompt in words alone")
        if not 1 <= max_tokens <= MAX_TOKENS:
            raise ValueError(f"max_tokens must lie between 1 and {MAX_TOKENS}, got {max_tokens}")
        input_ids, attention_mask = self.tokenize(captions)
        hidden = self.language_model(
            inputs_embeds=self._look_up(input_ids), attention_mask=attention_mask.to(self.device), use_cache=False
        ).last_hidden_state
        lengths = attention_mask.sum(1).tolist()
        end = self.template_drop + max_tokens
        return [row[self.template_drop : min(length, end)] for row, length in zip(hidden, lengths, strict=True)]

    @torch.no_grad()
    def encode_pictures(self, instruction: str, sources: Sequence[SourceImage]) -> PicturePrompt:
        """The embeddings of one instruction with its source images; an instruction beyond MAX_TOKENS is cut there.

        One at a time: no token is padding, and nothing depends on its company.
        """
        assert self.vision is not None, "a text-to-image model's text encoder sees no pictures"
        self.member.check_sources(len(sources), "the prompt")
        if PICTURE_PAD in instruction:
            raise ValueError(f"the instruction holds {PICTURE_PAD}, which stands for a token of a picture: take it out")
        pictures = [seen_by_text_encoder(source, self.member) for source in sources]
        prepared = self.vision.processor(images=pictures, return_tensors="pt")
        text = self.member.template.format(self.member.pictures(len(sources)) + instruction)
        for grid in prepared["image_grid_thw"]:
            tokens = int(grid.prod()) // self.vision.processor.merge_size**2
            text = text.replace(PICTURE_PAD, "\0" * tokens, 1)
        ids = self.tokenizer([text.replace("\0", PICTURE_PAD)], return_tensors="pt").input_ids
        # The pictures' tokens end with the last mark that they brought along; the instruction may hold marks of its own.
        ends = (ids[0] == self.tokenizer.convert_tokens_to_ids(PICTURE_END)).nonzero().flatten()
        picture_tokens = int(ends[len(sources) - 1]) + 1 - self.template_drop
        hidden = self._see(ids, prepared["pixel_values"], prepared["image_grid_thw"])
        return PicturePrompt(hidden[0, self.template_drop :][: picture_tokens + MAX_TOKENS], picture_tokens)

    def _look_up(self, ids: torch.Tensor) -> torch.Tensor:
        """The tokens' rows of the embedding table, which may have stayed in host memory, on the device."""
        table = self.language_model.embed_tokens
        return table(ids.to(table.weight.device)).to(self.device)

    def _see(self, ids: torch.Tensor, pixels: torch.Tensor, grids: torch.Tensor) -> torch.Tensor:
        """The last hidden state [1, L, D] of tokens and the pictures among them."""
        assert self.vision is not None
        model, device = self.vision.model, self.device
        is_picture = (ids == model.config.image_token_id).int()
        arguments: dict[str, Any] = {"mm_token_type_ids": is_picture.to(device)}
        if self.vision.positions == "consecutive":
            arguments = {"position_ids": torch.arange(ids.shape[1], device=device).expand(3, 1, -1)}
        return model(
            input_ids=ids.to(device),
            inputs_embeds=self._look_up(ids),
            attention_mask=torch.ones_like(ids).to(device),
            pixel_values=pixels.to(device),
            image_grid_thw=grids.to(device),
            use_cache=False,
            **arguments,
        ).last_hidden_state

    def encode(self, captions: list[str], max_tokens: int = MAX_TOKENS) -> Prompt:
        """Embeddings [B, T, D] and mask of a batch of captions."""
        return Prompt.from_list(self.encode_list(captions, max_tokens))


def picture_processor(preprocessor: Path | None) -> Any:
    """What cuts pictures into patches: transformers' processor for Qwen2-VL, always the one that resizes with Pillow.

    Its twin for torchvision, which is taken where that is installed, resizes otherwise: shards would depend on the machine.
    """
    from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

    if preprocessor is None:
        return Qwen2VLImageProcessorPil(size=PIXELS_OF_PICTURES)
    return Qwen2VLImageProcessorPil.from_pretrained(preprocessor.parent)


def text_tokens_of(member: Member, sizes: Sequence[tuple[int, int]]) -> int:
    """About how many of a prompt's tokens source images of these widths and heights make: one for 28 × 28 pixels."""
    areas = [member.text_encoder_area or width * height for width, height in sizes]
    return sum(round(area / PICTURE_SIDE**2) + len(PICTURE_MARKS) for area in areas)


class EncoderBytes(NamedTuple):
    """What the language model takes: whole on the device, or streamed there and in host memory; work for a caption's token."""

    whole: int
    streamed: int
    host: int
    token: int

    @classmethod
    def of(cls, text_encoder: Component, dtype: torch.dtype, sees: bool = False) -> "EncoderBytes":
        """From the headers of its files; reads no weights. `sees`: with the vision tower, which stays on the device."""
        whole = table = width = 0
        layers: dict[str, int] = {}
        for stored_name, stored in read_headers(text_encoder.weights).items():
            name = language_model_name(stored_name)
            if name is None and sees and _VISION_TOWER.match(stored_name):
                name = stored_name
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
