"""Module names in quantization configs: found, renamed and written back."""
