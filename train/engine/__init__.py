"""The DeepSpeed engine around the step: optimizer, its state, the learning rate."""
