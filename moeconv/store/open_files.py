"""Local files that are open for reading, shared by threads, and proof that they stay unchanged."""

from __future__ import annotations

import os
from collections.abc import Mapping
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Final, Protocol, TypeAlias

from moeconv.core.system_errors import explained
from moeconv.errors import IoFailed, SourceChanged, quoted
from moeconv.store.descriptors import DescriptorPool, Lease
from moeconv.store.documents import CHECK_READABLE, open_regular
from moeconv.store.file_io import FileEnded, read_into

Inode: TypeAlias = tuple[int, int]  # device, inode
_NONE: Final[Mapping[int, Inode]] = MappingProxyType({})


class PinnedFile(Protocol):
    """A local file as it was when it was looked at."""

    @property
    def name(self) -> str: ...
    @property
    def path(self) -> Path: ...
    @property
    def size(self) -> int: ...
    @property
    def mtime_ns(self) -> int: ...


@dataclass(frozen=True, slots=True)
class OpenFile:
    """An open file: its number among the files, and a descriptor."""

    number: int
    descriptor: int


class OpenFiles:
    """Files by number, at most `most` of them open at once.

    A file that is opened again must be the one that was read before, and unchanged.
    inodes: of files that were looked at more closely before; others are known once opened.
    """

    def __init__(
        self, files: Mapping[int, PinnedFile], *, most: int, inodes: Mapping[int, Inode] = _NONE
    ) -> None:
        self._files = files
        self._known = inodes
        self._inodes: dict[int, Inode] = {}  # of all that were opened
        self.pool = DescriptorPool(self._open, self._refuse_changed, most=most)

    @property
    def numbers(self) -> list[int]:
        """All files that were opened, in order."""
        return sorted(self._inodes)

    def reader(self) -> ThreadReader:
        """A way to read them, for one thread."""
        return ThreadReader(self, Lease(self.pool))

    def open_all(self, numbers: set[int]) -> None:
        """Open files once, whether or not they stay open. Raises IoFailed, SourceChanged."""
        with closing(self.reader()) as reader:
            for number in sorted(numbers):
                reader.file(number)

    def _open(self, number: int) -> int:
        """Raises OSError, SourceChanged, UnsafePath."""
        file = self._files[number]
        descriptor = open_regular(file.path, name=file.name)
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
        known = self._inodes.setdefault(number, self._known.get(number, found))
        if known == found and (facts.st_size, facts.st_mtime_ns) == (file.size, file.mtime_ns):
            return
        raise SourceChanged(
            f"{quoted(file.name)} has changed since its header was read",
            at=quoted(str(file.path)),
            cause=f"it had {file.size:,} bytes then and has {facts.st_size:,} now; if these are "
            "equal, it was written to or replaced",
        )

    def ended(self, number: int, problem: FileEnded) -> IoFailed:
        """The error for a file that is shorter than its header says: it has probably changed."""
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
        """Raise SourceChanged if a file is not the one that was opened any more, IoFailed."""
        still_open = self.pool.open
        for number in self.numbers:
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
        self.pool.close()


class ThreadReader:
    """Reads of one thread; it holds the file that it read last."""

    def __init__(self, files: OpenFiles, lease: Lease) -> None:
        self._files = files
        self._lease = lease

    def file(self, number: int) -> OpenFile:
        """File `number`, open until another is asked for. Raises IoFailed, SourceChanged."""
        try:
            return OpenFile(number, self._lease.on(number))
        except OSError as problem:
            raise self._files.failed(number, problem) from None

    def read_into(self, number: int, view: memoryview, offset: int) -> None:
        """Fill `view` from byte `offset` of a file on. Raises IoFailed, SourceChanged."""
        lease = self._lease
        descriptor = lease.descriptor if lease.number == number else self.file(number).descriptor
        try:
            read_into(descriptor, view, offset)
        except FileEnded as problem:
            raise self._files.ended(number, problem) from None
        except OSError as problem:
            raise self._files.failed(number, problem, offset) from None

    def close(self) -> None:
        """Hold no file any more."""
        self._lease.close()
