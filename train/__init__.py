"""Everything that needs gradients."""
