"""The frozen Qwen-Image pipeline: loading, text encoding, VAE, transformer, σ schedule, sampling. Knows nothing of training."""
