"""Big checkpoints, and what converting them costs."""
