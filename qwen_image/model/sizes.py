"""Sizes that every Qwen-Image checkpoint shares, and the dtypes that options name; one place for all packages."""

import torch

LATENT_CHANNELS = 16
VAE_FACTOR = 8  # pixels a latent on each side


DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


PIXEL_MULTIPLE = 16  # pixels a transformer token: 8 for the VAE, 2 for packing
