"""The format of a data set on disk."""
