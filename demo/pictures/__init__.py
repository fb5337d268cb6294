"""Pictures that a program draws: things on backgrounds, their captions, and the new things that a LoRA learns. No torch."""
