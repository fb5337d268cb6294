"""The frozen blocks as a stream: their matrices lie elsewhere and are on the device while their block computes."""
