"""The least and the greatest weight of a sample or a set: beyond are typing errors, and columns that mean something else."""

LEAST, MOST = 0.001, 1000.0  # an image of a folder 10_name whose row has one too has their product
