"""The least and the greatest weight of a sample or a set: beyond are typing errors, and columns that mean something else."""

LEAST, MOST = 0.001, 1000.0
