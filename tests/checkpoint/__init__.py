"""Hostile and broken files: headers, indexes, links, and what else lies in a directory."""
