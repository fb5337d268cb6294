"""This process among others: ranks, signals, exit codes."""
