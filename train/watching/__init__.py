"""What people see of a run: metrics, the loss watch, validation, sample images."""
