"""The training step: loss module, flat parameter, CUDA graphs, fused projections."""
