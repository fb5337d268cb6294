"""LoRA on the frozen transformer: targets, injection, files."""
