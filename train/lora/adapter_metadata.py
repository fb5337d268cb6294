"""The header that diffusers' `save_lora_weights` writes: PEFT's LoraConfig or LoKrConfig as JSON, rank and alpha a layer."""

import json
import math
import re
from dataclasses import dataclass, field
from typing import Any

from files.shown import shown

KEY = "lora_adapter_metadata"
PREFIX = "transformer."  # of the entries about the transformer; a text encoder's have another
DEFAULT_RANK = DEFAULT_ALPHA = 8  # LoraConfig's own, for what the header leaves out


@dataclass(frozen=True)
class AdapterMetadata:
    """Ranks and alphas by layer; without any, every layer has the scale 1.

    A pattern is a regular expression for the end of a layer's name, the first that matches counts (peft 0.21,
    utils/other.py, get_pattern_key).
    """

    present: bool = False
    rank: float = DEFAULT_RANK
    alpha: float = DEFAULT_ALPHA
    rank_pattern: dict[str, float] = field(default_factory=dict)
    alpha_pattern: dict[str, float] = field(default_factory=dict)
    rslora: bool = False
    dora: bool = False
    file: str = ""  # for messages

    @classmethod
    def read(cls, metadata: dict[str, str], file: str) -> "AdapterMetadata":
        """Raises ValueError, naming `file`, for a header that is no such JSON."""
        if KEY not in metadata:
            return cls()
        try:
            adapter = json.loads(metadata[KEY])
            if not isinstance(adapter, dict):
                raise ValueError(f"it is a {type(adapter).__name__}, not an object")
            own = {name.removeprefix(PREFIX): value for name, value in adapter.items() if name.startswith(PREFIX)}
            if (
                not own and "peft_type" in adapter
            ):  # a transformer's save_lora_adapter: its config alone, without a prefix
                own = adapter
            if not own:
                return cls()
            return cls(
                True,
                _number("r", own.get("r", DEFAULT_RANK)),
                _number("lora_alpha", own.get("lora_alpha", own.get("alpha", DEFAULT_ALPHA))),  # LoKrConfig's name
                _numbers("rank_pattern", own.get("rank_pattern")),
                _numbers("alpha_pattern", own.get("alpha_pattern")),
                _switch("use_rslora", own.get("use_rslora")),
                _switch("use_dora", own.get("use_dora")),
                file,
            )
        except (ValueError, OverflowError, RecursionError, re.error) as error:
            raise ValueError(f"{file}: {KEY} in its header is damaged: {shown(error)}") from error

    def scale(self, layer: str, rank: int | None) -> float:
        """alpha/rank (rsLoRA: alpha/√rank) of a layer. Raises ValueError unless the header knows it by this rank.

        None: the weights of the layer tell none (a LoKr of whole factors), so the header's counts.
        """
        if not self.present:
            return 1.0
        said = _matching(self.rank_pattern, layer, self.rank)
        if rank is None and said >= 1:
            rank = int(said)
        if said != rank:
            raise ValueError(f"{self.file}: {KEY} says rank {said:g} for {layer}, its weights have rank {rank}")
        alpha = _matching(self.alpha_pattern, layer, self.alpha)
        return alpha / math.sqrt(rank) if self.rslora else alpha / rank


def _matching(patterns: dict[str, float], layer: str, default: float) -> float:
    return next((value for text, value in patterns.items() if re.match(rf"(.*\.)?({text})$", layer)), default)


def _numbers(name: str, values: Any) -> dict[str, float]:
    if not isinstance(values or {}, dict):
        raise ValueError(f"{name} is {shown(repr(values))}, not an object")
    for pattern in values or {}:
        re.compile(pattern)
    return {pattern: _number(f"{name} of {pattern}", value) for pattern, value in (values or {}).items()}


def _switch(name: str, value: Any) -> bool:
    if value not in (None, True, False):  # the text "false" would count as true
        raise ValueError(f"{name} is {shown(repr(value))}, not true or false")
    return bool(value)


def _number(name: str, value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        raise ValueError(f"{name} is {shown(repr(value))}, not a finite number")
    return value
