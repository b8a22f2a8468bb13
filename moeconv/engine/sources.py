"""The source files, opened once for all workers, and proof that nobody changed them meanwhile."""

from __future__ import annotations

import errno
import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager

from moeconv.checkpoint.source import DataFile
from moeconv.errors import IoFailed, SourceChanged, quoted


class Sources:
    """Descriptors of the data files, by number; reads are positioned, so threads may share them."""

    def __init__(self, files: tuple[DataFile, ...]) -> None:
        self._files = files
        self._descriptors: dict[int, int] = {}
        self._lock = threading.Lock()

    def descriptor(self, number: int) -> int:
        """The open descriptor of source file `number`. Raises IoFailed, SourceChanged."""
        known = self._descriptors.get(number)
        if known is not None:
            return known
        with self._lock:
            if number not in self._descriptors:
                file = self._files[number]
                try:
                    opened = os.open(file.path, os.O_RDONLY | os.O_CLOEXEC)
                except OSError as problem:
                    raise IoFailed(
                        f"cannot open {quoted(file.name)}",
                        at=quoted(str(file.path)),
                        cause=problem.strerror,
                        fix="raise the limit with `ulimit -n 4096`, then run again"
                        if problem.errno == errno.EMFILE
                        else "check that the source is still there and may be read",
                    ) from None
                self._descriptors[number] = opened
                self._check(number)
            return self._descriptors[number]

    def read_into(self, number: int, view: memoryview, offset: int) -> None:
        """Fill `view` from source file `number` at byte `offset`. Raises IoFailed."""
        descriptor = self.descriptor(number)
        done = 0
        while done < len(view):
            try:
                got = os.preadv(descriptor, [view[done:]], offset + done)
            except OSError as problem:
                raise self._failed(number, offset + done, problem.strerror) from None
            if got == 0:
                self._check(number)
                raise self._failed(number, offset + done, "the file ends here")
            done += got

    def _failed(self, number: int, offset: int, why: str | None) -> IoFailed:
        file = self._files[number]
        return IoFailed(
            f"cannot read {quoted(file.name)}",
            at=f"{quoted(str(file.path))}, byte {offset:,}",
            cause=why,
            fix="check the disk and the file, then run again",
        )

    def _check(self, number: int) -> None:
        file = self._files[number]
        stat = os.fstat(self._descriptors[number])
        if (stat.st_size, stat.st_mtime_ns) != (file.size, file.mtime_ns):
            raise SourceChanged(
                f"{quoted(file.name)} changed while it was being converted",
                at=quoted(str(file.path)),
                cause=f"it had {file.size:,} bytes when the plan was made, "
                f"and has {stat.st_size:,} now, or it was written to",
                fix="wait until nothing writes to the source, then run again",
            )

    def unchanged(self) -> None:
        """Raise SourceChanged if a file that was read is not the one that was planned."""
        for number in self._descriptors:
            self._check(number)

    def close(self) -> None:
        """Close everything."""
        for descriptor in self._descriptors.values():
            os.close(descriptor)
        self._descriptors.clear()


@contextmanager
def opened(files: tuple[DataFile, ...]) -> Iterator[Sources]:
    """Sources that close themselves."""
    sources = Sources(files)
    try:
        yield sources
    finally:
        sources.close()
