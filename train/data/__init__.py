"""From shards to batches: data set, order, loaders, remote shards."""
