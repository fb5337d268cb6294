"""Seeds of global generators, and deterministic kernels where asked for."""

import torch

from train.config.train_config import TrainConfig


def seed_everything(config: TrainConfig) -> None:
    """Seed what draws from global generators (LoRA dropout alone) and make kernels deterministic if asked."""
    torch.manual_seed(config.seed)
    if config.deterministic:
        torch.use_deterministic_algorithms(True)
        torch.backends.cudnn.benchmark = False
