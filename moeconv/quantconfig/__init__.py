"""Find module names in quantization configs and rename them."""
