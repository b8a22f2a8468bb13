"""Where bytes are: list, stat, read; names are checked here, once."""
