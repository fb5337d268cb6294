"""What a run writes to come back or to be used: run folder, checkpoints, LoRA files."""
