"""The frozen model of a run: loaded, merged, quantized, partitioned."""
