"""Seeds of global generators, and deterministic kernels where asked for."""

import torch


def seed_everything(seed: int, deterministic: bool) -> None:
    """Seed what draws from global generators (LoRA dropout alone) and make kernels deterministic if asked."""
    torch.manual_seed(seed)
    if deterministic:
        torch.use_deterministic_algorithms(True)
        torch.backends.cudnn.benchmark = False
