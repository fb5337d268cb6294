"""Frozen linear layers and MLPs in float8 (e4m3)."""
