"""What a user types: one module a command, `ui.py` the only place that prints."""
