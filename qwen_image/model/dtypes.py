"""The dtypes of weights and computation, by the names that options give them."""

import torch

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
