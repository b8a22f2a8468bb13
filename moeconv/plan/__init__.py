"""From one layout to another, as a value: output files, tiles, ledger. Pure."""
