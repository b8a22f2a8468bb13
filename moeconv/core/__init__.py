"""Strict JSON, schemas, names, text, digests, signals: what every package may use."""
