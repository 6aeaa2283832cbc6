"""The commands that look into a run: one module each, declaring its options and doing its work."""
