"""The output directory as a transaction: preflight, journal, commit, backup, resume."""
