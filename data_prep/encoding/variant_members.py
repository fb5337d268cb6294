"""The caption variants of an encoded sample as they stand in its shard: what its json tells of them, and their members."""

from __future__ import annotations

import json
import tarfile
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from data_prep.shard_format.shards import padded, variant_suffix

if TYPE_CHECKING:
    import torch


def variant_members(
    texts: Sequence[str], embeds: Sequence[torch.Tensor]
) -> tuple[list[dict[str, Any]], list[tuple[str, bytes]]]:
    """`variants` of the json (shards.StoredVariant's fields), and the members behind KEY.txt with their suffixes.

    `texts`: what came of each draw; `embeds`: [T, D] of each different one, in the order in which they come first.
    """
    import safetensors.torch

    entries: list[dict[str, Any]] = []
    members: list[tuple[str, bytes]] = []
    end = 0
    for number, (text, tensor) in enumerate(zip(dict.fromkeys(texts), embeds, strict=True), start=1):
        draws = [draw for draw, drawn in enumerate(texts) if drawn == text]
        entries.append({"caption": text, "tokens": len(tensor), "draws": draws})
        if number > 1:  # the first is the sample's own
            data = safetensors.torch.save({"prompt_embeds": tensor})
            entries[-1] |= {"offset": end + tarfile.BLOCKSIZE, "size": len(data)}
            members.append((variant_suffix(number), data))
            end += tarfile.BLOCKSIZE + padded(len(data))
    return entries, members


def with_variants(body: bytes, entries: list[dict[str, Any]]) -> bytes:
    """The json member of an image sample for one whose captions were given another form."""
    fields = json.loads(body)
    fields = fields if isinstance(fields, dict) else {}
    fields.pop("captions", None)
    fields["caption"] = entries[0]["caption"]
    if len(entries) > 1:
        fields["variants"] = entries
    return json.dumps(fields, ensure_ascii=False, separators=(",", ":")).encode()
