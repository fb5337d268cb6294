"""Flow matching as pure tensor functions."""
