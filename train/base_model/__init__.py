"""The frozen model of a run: loaded, merged, quantized, its blocks at home."""
