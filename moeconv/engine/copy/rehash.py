"""Taking digests of what is on a disk, and keeping nothing else of it."""

from __future__ import annotations

from moeconv.checkpoint.source import DataFile
from moeconv.engine.copy.pool import Limits, Progress, Reader, run_tiles
from moeconv.engine.copy.worker import Digests, Origin
from moeconv.plan.model import OutputFile


class HashSink(Reader):
    """A target that keeps nothing but the digests."""

    def __init__(self, file: OutputFile, found: dict[str, Digests]) -> None:
        self._file = file
        self._found = found

    def open(self) -> None:
        """Nothing to open."""

    def write(self, view: memoryview, offset: int, origin: Origin | None = None) -> None:
        """Nothing to write: the digest was taken in passing."""

    def finish(self, digests: Digests) -> None:
        """Keep the file's digests."""
        self._found[self._file.name] = digests

    def close(self) -> None:
        """Nothing to close."""


def digests_of(
    files: tuple[OutputFile, ...],
    sources: tuple[DataFile, ...],
    *,
    limits: Limits,
    progress: Progress,
) -> dict[str, Digests]:
    """The digests of every unit of planned files, by file, freshly read from the sources."""
    found: dict[str, Digests] = {}
    run_tiles(files, sources, lambda file: HashSink(file, found), limits=limits, progress=progress)
    return found
