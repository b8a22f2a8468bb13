"""How bytes get from a source's file into the output: asked of the file systems, once a pair."""

from __future__ import annotations

import os
import threading
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

from moeconv.engine.copy.syscalls import clone_range, copy_in_kernel
from moeconv.engine.output.atomic_file import NEW_FILE, partial_path, writing
from moeconv.store.documents import opened, unreadable

REFLINK: Final = "reflink"
KERNEL: Final = "copy_file_range"
BUFFER: Final = "read and write"


@dataclass(slots=True)
class Tally:
    """Bytes by the way they went; workers add to it at once."""

    cloned: int = 0
    copied: int = 0  # in the kernel
    direct: int = 0  # from a buffer, past the page cache
    written: int = 0  # from a buffer, through it
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def add(self, *, cloned: int = 0, copied: int = 0, direct: int = 0, written: int = 0) -> None:
        """Count."""
        with self._lock:
            self.cloned += cloned
            self.copied += copied
            self.direct += direct
            self.written += written


@dataclass(slots=True)
class Methods:
    """The best way from each source's file system to that of OUT, and what it was used for."""

    out: Path
    block: int = 4096
    tally: Tally = field(default_factory=Tally)
    found: dict[int, str] = field(default_factory=dict)  # by the source's st_dev
    devices: tuple[int, ...] = ()  # of the source's files
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def ask(self, sources: Iterable[Path]) -> None:
        """Find the methods for all file systems that these files are on, before any byte moves.

        Raises IoFailed, DiskFull.
        """
        devices: list[int] = []
        for path in sources:
            try:
                devices.append(path.stat().st_dev)
            except OSError as problem:
                raise unreadable(path, problem, name=path.name) from None
            if devices[-1] not in self.found:
                with opened(path, name=path.name) as (descriptor, _):
                    self.of(descriptor)
        self.devices = tuple(devices)

    def of_file(self, number: int) -> str:
        """The best method for a file of the source, of those that were asked for."""
        return self.found.get(self.devices[number], BUFFER) if self.devices else BUFFER

    def of(self, source: int) -> str:
        """The best method for an open file of the source. Raises IoFailed, DiskFull."""
        device = os.fstat(source).st_dev
        with self._lock:
            if device not in self.found:
                self.found[device] = self._probe(source)
            return self.found[device]

    def _probe(self, source: int) -> str:
        """Try the ways on a scratch file beside the output, best first."""
        with _scratch(self.out) as target, writing(self.out):
            self.block = max(os.fstatvfs(target).f_bsize, 4096)
            size = os.fstat(source).st_size
            if size >= self.block:
                os.truncate(target, self.block)
                if clone_range(source, 0, target, 0, self.block):
                    return REFLINK
            if size and copy_in_kernel(source, 0, target, 0, 1) == 1:
                return KERNEL
        return BUFFER


@contextmanager
def _scratch(out: Path) -> Iterator[int]:
    path = partial_path(out, "probe")
    with writing(path):
        descriptor = os.open(path, NEW_FILE, 0o600)
    try:
        yield descriptor
    finally:
        with suppress(OSError):  # what was in it is of no account
            os.close(descriptor)
        path.unlink(missing_ok=True)
