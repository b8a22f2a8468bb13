"""What a checkpoint stores: headers, index, sidecars, config; knows nothing of experts."""
