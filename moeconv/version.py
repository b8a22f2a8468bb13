"""The version, which stands in every manifest: one place, no import of package metadata."""

__version__ = "0.1.0"
