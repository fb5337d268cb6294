"""What a run will do, told before weights are read, and what it did: the report of a run."""
