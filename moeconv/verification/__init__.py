"""Proof that an output is what it should be: structure, digests, against the source, diff."""
