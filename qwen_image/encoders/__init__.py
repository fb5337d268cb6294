"""Frozen encoders: captions to prompt embeddings, pixels to latents and back."""
