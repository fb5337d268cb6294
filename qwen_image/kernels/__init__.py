"""Triton kernels and the operators around them; torch and Triton alone."""
