"""What is on disk: safetensors headers, index, sidecars. Knows nothing of experts."""
