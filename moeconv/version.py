"""The version, which every manifest records: in one place, without importing package metadata."""

__version__ = "0.1.0"
