"""`--masked_loss`: the flow-matching loss weighted by where it lies in the image.

With a mask m in 0 … 1 on the latent grid (1: learn what is here) and the smallest weight μ (`--mask_min_weight`)

    w = μ + (1 − μ)·m,    loss = weight(σ) · Σ w·e² / Σ w,    e = prediction − v,

sums over a sample's elements, each latent position with its w for all its channels. Dividing by Σ w, sample by sample, keeps
the loss's scale whatever the mask's area is: a mask that is the same everywhere changes nothing, and the learning rate stays
right. Within a sample the gradient of an element outside (m = 0) is μ times what the same error gives inside (m = 1).

A mask that is 0 everywhere says nothing of where to look, and at any μ > 0 it changes nothing; so it is at μ = 0 too: such a
sample counts as a whole.
"""

import torch

from qwen_image.model.conditioning import pack_latents
from qwen_image.model.sizes import LATENT_CHANNELS


def mask_weights(mask: torch.Tensor, minimum: float) -> torch.Tensor:
    """w, float32 [B, 1, 1, H/8, W/8], of masks as shards have them: uint8 [B, H/8, W/8], 255 for 1."""
    share = mask.float() / 255
    weights = minimum + (1 - minimum) * share
    empty = (mask == 0).flatten(1).all(1).view(-1, 1, 1)
    return weights.masked_fill(empty, 1.0)[:, None, None]


def masked_flow_matching_loss(
    prediction: torch.Tensor, target: torch.Tensor, weight: torch.Tensor, where: torch.Tensor
) -> torch.Tensor:
    """float32 [B]: each sample's squared error, averaged with the weights `where` (`mask_weights`), times its weight [B].

    `prediction` and `target` are packed: [B, (H/16)·(W/16), 64].
    """
    batch, _, _, height, width = where.shape
    by_element = pack_latents(where.expand(batch, LATENT_CHANNELS, 1, height, width))
    squared_error = (prediction.float() - target.float()) ** 2
    return (squared_error * by_element).flatten(1).sum(1) / by_element.flatten(1).sum(1) * weight
