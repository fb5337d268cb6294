"""Image shards to latents and prompt embeddings."""
