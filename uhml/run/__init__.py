"""A run that survives: its folder, checkpoints, state and status, and what to do when it is asked to end."""
