"""Does it fit, and what is the fastest that does: memory plan, activation checkpointing, CUDA graphs, trial steps."""
