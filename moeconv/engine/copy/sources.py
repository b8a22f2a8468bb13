"""The source files, shared by all workers, and proof that nobody changed them meanwhile."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from moeconv.checkpoint.source import DataFile
from moeconv.core.system_errors import explained
from moeconv.errors import IoFailed, SourceChanged, quoted
from moeconv.store.descriptors import DescriptorPool, Lease
from moeconv.store.documents import CHECK_READABLE
from moeconv.store.file_io import FileEnded, read_into


@dataclass(frozen=True, slots=True)
class SourceFile:
    """An open file of the source: its number among the source's files, and a descriptor."""

    number: int
    descriptor: int


class Sources:
    """The data files by number, at most `most` of them open at once.

    A file that is opened again must be the one that was read before, and unchanged.
    """

    def __init__(self, files: tuple[DataFile, ...], *, most: int) -> None:
        self._files = files
        self._identities: dict[int, tuple[int, int]] = {}  # of all that were read: device, inode
        self._pool = DescriptorPool(self._open, self._refuse_changed, most=most)

    def reader(self) -> SourceReader:
        """A way to read them, for one thread."""
        return SourceReader(self, Lease(self._pool))

    def _open(self, number: int) -> int:
        """Raises OSError, SourceChanged."""
        descriptor = os.open(self._files[number].path, os.O_RDONLY | os.O_CLOEXEC)
        try:
            self._refuse_changed(number, descriptor)
        except BaseException:
            os.close(descriptor)
            raise
        return descriptor

    def _refuse_changed(self, number: int, descriptor: int) -> None:
        self._check(number, os.fstat(descriptor))

    def _check(self, number: int, facts: os.stat_result) -> None:
        file, found = self._files[number], (facts.st_dev, facts.st_ino)
        same = self._identities.setdefault(number, found) == found
        if same and (facts.st_size, facts.st_mtime_ns) == (file.size, file.mtime_ns):
            return
        raise SourceChanged(
            f"{quoted(file.name)} changed while it was being read",
            at=quoted(str(file.path)),
            cause=f"it had {file.size:,} bytes when the plan was made, "
            f"and has {facts.st_size:,} now, or it was written to or replaced",
        )

    def ended(self, number: int, problem: FileEnded) -> IoFailed:
        """The error for a file that has fewer bytes than its header says: it changed, mostly."""
        try:
            self._check(number, self._files[number].path.stat())
        except SourceChanged as changed:
            return changed
        except OSError as gone:
            return self.failed(number, gone)
        return self.failed(number, problem)

    def failed(self, number: int, problem: OSError, offset: int | None = None) -> IoFailed:
        """The error for a file that cannot be opened, or read at byte `offset`."""
        file, (cause, fix) = self._files[number], explained(problem, otherwise=CHECK_READABLE)
        place = quoted(str(file.path))
        return IoFailed(
            f"cannot {'open' if offset is None else 'read'} {quoted(file.name)}",
            at=place if offset is None else f"{place}, byte {offset:,}",
            cause=cause,
            fix=fix,
        )

    def unchanged(self) -> None:
        """Raise SourceChanged if a file that was read is not the one that was planned, IoFailed."""
        still_open = self._pool.open
        for number in self._identities:
            descriptor = still_open.get(number)
            try:
                facts = (
                    os.fstat(descriptor)
                    if descriptor is not None
                    else self._files[number].path.stat()
                )
            except OSError as problem:
                raise self.failed(number, problem) from None
            self._check(number, facts)

    def close(self) -> None:
        """Close everything."""
        self._pool.close()


class SourceReader:
    """Reads of one thread; it holds the file that it read last."""

    def __init__(self, sources: Sources, lease: Lease) -> None:
        self._sources = sources
        self._lease = lease

    def file(self, number: int) -> SourceFile:
        """Source file `number`, open until another is asked for. Raises IoFailed, SourceChanged."""
        try:
            return SourceFile(number, self._lease.on(number))
        except OSError as problem:
            raise self._sources.failed(number, problem) from None

    def read_into(self, number: int, view: memoryview, offset: int) -> None:
        """Fill `view` from byte `offset` of a source file on. Raises IoFailed, SourceChanged."""
        lease = self._lease
        descriptor = lease.descriptor if lease.number == number else self.file(number).descriptor
        try:
            read_into(descriptor, view, offset)
        except FileEnded as problem:
            raise self._sources.ended(number, problem) from None
        except OSError as problem:
            raise self._sources.failed(number, problem, offset) from None

    def close(self) -> None:
        """Hold no file any more."""
        self._lease.close()


@contextmanager
def opened(files: tuple[DataFile, ...], *, most: int) -> Iterator[Sources]:
    """Sources that close themselves. most: how many are open at once, one a thread at least."""
    sources = Sources(files, most=most)
    try:
        yield sources
    finally:
        sources.close()
