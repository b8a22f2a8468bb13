"""What a source of files gives: names, sizes, ranges of bytes, and local paths where it has any."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Protocol


@dataclass(frozen=True, slots=True)
class FileFacts:
    """Size in bytes and time of the last change; 0 where the store keeps no time."""

    size: int
    mtime_ns: int


class Store(Protocol):
    """The files of one source, by relative name."""

    address: str

    def names(self, *, exclude: tuple[str, ...] = ()) -> list[str]:
        """Names of all files but those that the globs of `exclude` leave out."""

    def stat(self, name: str) -> FileFacts | None:
        """Size and time of a file; None where it does not exist."""

    def read(self, name: str, offset: int, nbytes: int) -> bytes:
        """Up to `nbytes` bytes from `offset` on; fewer only where the file ends."""

    def local_path(self, name: str) -> Path | None:
        """The local file, or None where its bytes are elsewhere."""
