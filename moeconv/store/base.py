"""What a source of files gives: names, sizes, ranges of bytes, and local paths where it has any."""

from __future__ import annotations

from pathlib import Path
from typing import Protocol


class File(Protocol):
    """A file of a store: its name there, its size in bytes and when it was last changed.

    mtime_ns: 0 where the store keeps no time.
    """

    @property
    def name(self) -> str: ...
    @property
    def size(self) -> int: ...
    @property
    def mtime_ns(self) -> int: ...

    @property
    def path(self) -> Path:
        """The local file, links followed. Raises NotLocal where the bytes are elsewhere."""

    def read(self, offset: int, nbytes: int) -> bytes:
        """Exactly `nbytes` bytes from `offset` on. Raises IoFailed or one of its classes."""


class Store(Protocol):
    """The files of one source, by relative name.

    address: what users call it. root: the local directory, None where the files are elsewhere.
    """

    @property
    def address(self) -> str: ...
    @property
    def root(self) -> Path | None: ...

    def entries(self) -> list[str]:
        """Names of what is directly in the source, in natural order; folders end in `/`.

        Raises SourceMissing, DownloadFailed.
        """

    def names(self, *, exclude: tuple[str, ...] = ()) -> list[str]:
        """Names of all files in natural order, less those that the globs of `exclude` match.

        A folder that cannot be listed is there with a `/` at the end; `file` says why it cannot.
        Raises SourceMissing, DownloadFailed.
        """

    def file(self, name: str) -> File | None:
        """The file of this name; None where there is none.

        Raises UnsafePath for a name that cannot be used or leads elsewhere, and for what is not a
        regular file; SourceMissing, DownloadFailed.
        """
