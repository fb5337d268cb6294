"""From an order of samples to batches on each rank: loaders and their workers, and what a run takes of its data."""
