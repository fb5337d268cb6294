"""What both operators of the joint layout share: the tensors they make, the heads a program takes, the kernels' constants."""

from typing import Any

import torch

NORM_EPS = 1e-6  # of all norms


def heads_a_program(heads: int, most: int) -> int:
    """The largest power of two up to `most` (one itself) that divides `heads`."""
    return min(most, heads & -heads)


def empty_outputs(
    image: torch.Tensor, text: torch.Tensor, dim: int, save: bool = True
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Query, key, value [B, L, heads, dim], and for the 1 / rms of q and k, if these are saved, float32 [B, L, 2, heads].

    Of projections image [B, S, 3·D] and text [B, T, 3·D], or [B, T, 2·D] without a query: query is then [B, S, heads, dim].
    """
    batch, image_tokens, tokens = image.shape[0], image.shape[1], text.shape[1] + image.shape[1]
    heads = image.shape[2] // 3 // dim
    queries = tokens if text.shape[2] == image.shape[2] else image_tokens
    query = image.new_empty((batch, queries, heads, dim))
    key, value = (image.new_empty((batch, tokens, heads, dim)) for _ in range(2))
    return query, key, value, image.new_empty((batch, tokens if save else 0, 2, heads), dtype=torch.float32)


def empty_gradients(
    grad_query: torch.Tensor, grad_key: torch.Tensor, text_tokens: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """The gradients of those projections, image [B, S, 3·D] and text [B, T, 3·D or 2·D], for those of query and key."""
    batch, tokens, heads, dim = grad_key.shape
    text_parts = 3 if grad_query.shape[1] == tokens else 2
    image = grad_key.new_empty((batch, tokens - text_tokens, 3 * heads * dim))
    return image, grad_key.new_empty((batch, text_tokens, text_parts * heads * dim))


def constants(heads: int, dim: int, image: torch.Tensor, text: torch.Tensor, keep: Any) -> dict[str, Any]:
    """The constants that all kernels are compiled for; image and text are the projections or their gradients."""
    return {"HEADS": heads, "DIM": dim, "TEXT_QUERY": text.shape[2] == image.shape[2], "KEEP": keep is not None}
