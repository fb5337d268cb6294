"""Samples of shards here or remote, their order, what chance decides, and one batch of them."""
