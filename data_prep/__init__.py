"""Image folders to WebDataset shards, and shards to encoded shards."""
