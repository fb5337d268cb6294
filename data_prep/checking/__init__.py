"""Whether a data set is whole, and a report of it."""
