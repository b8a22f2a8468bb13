"""Plan conversions: output files, the tiles that fill them, and a ledger. Touches no disk."""
