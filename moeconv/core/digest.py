"""The digest of the format: xxh3-128 as 32 lower-case hexadecimal digits (FORMAT.md §6)."""

from __future__ import annotations

import json
from collections.abc import Iterable

import xxhash

DIGEST_HEX_DIGITS = 32


def digest(data: bytes | bytearray | memoryview) -> str:
    """xxh3-128 of the bytes. Source: the XXH3 specification, canonical (big-endian) hex form."""
    return xxhash.xxh3_128_hexdigest(data)


def hasher() -> xxhash.xxh3_128:
    """A running xxh3-128."""
    return xxhash.xxh3_128()


def fingerprint_line(address: str, dtype: str, shape: tuple[int, ...], value: str) -> bytes:
    """One logical matrix or other tensor: `address dtype [shape] digest`, newline.

    The address is escaped as in a JSON string, and its spaces too, so that no name can imitate
    another line.
    """
    escaped = json.dumps(address, ensure_ascii=True)[1:-1].replace(" ", "\\u0020")
    sizes = ",".join(map(str, shape))
    return f"{escaped} {dtype} [{sizes}] {value}\n".encode("ascii")


def fingerprint(lines: Iterable[bytes]) -> str:
    """xxh3-128 over the sorted lines: the same for every layout of the same values."""
    state = hasher()
    for line in sorted(lines):
        state.update(line)
    return state.hexdigest()


# a tensor without bytes has no tile, but it has a digest
EMPTY_DIGEST = digest(b"")
