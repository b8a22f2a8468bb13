"""Strict JSON, schemas, names, text, digests, signals: what every room may use."""
