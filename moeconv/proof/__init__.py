"""Proofs about what is on disk: structure, digests, the source byte by byte, diff, fingerprint."""
