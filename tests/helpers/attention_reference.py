"""Masked attention in float64, and masks of padded text."""

import torch


def reference(query, key, value, keep):
    """Masked attention written out, in float64."""
    scores = query @ key.transpose(-1, -2) / query.shape[-1] ** 0.5
    scores = scores.masked_fill(~keep[:, None, None], float("-inf"))
    return scores.softmax(-1) @ value


def keep_mask(lengths, text, tokens):
    place = torch.arange(tokens)
    return (place < torch.tensor(lengths)[:, None]) | (place >= text)
