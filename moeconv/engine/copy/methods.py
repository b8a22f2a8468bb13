"""Methods to copy bytes from a source file to the output; each pair of file systems is probed once.

A new method is a class here, in `_BEST_FIRST`, and its system call in `syscalls`.
"""

from __future__ import annotations

import os
import threading
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import ClassVar, Final

from moeconv.engine.copy.buffers import PAGE_BYTES
from moeconv.engine.copy.syscalls import clone_range, copy_in_kernel
from moeconv.engine.output.atomic_file import NEW_FILE, partial_path, writing
from moeconv.store.documents import opened, unreadable


class CopyMethod(ABC):
    """A way to get bytes from one open file into another; both are given as descriptors.

    reads_bytes: whether every byte passes through a buffer of this process.
    shares_blocks: whether `clone` may do anything.
    """

    name: ClassVar[str]
    reads_bytes: ClassVar[bool] = False
    shares_blocks: ClassVar[bool] = False

    @abstractmethod
    def probe(self, source: int, size: int, scratch: int, block: int) -> bool:
        """Return whether it works from a source of `size` bytes to an empty scratch file.

        block: the block size of the scratch file's file system.
        """

    @abstractmethod
    def copy(self, source: int, offset: int, target: int, at: int, nbytes: int) -> int:
        """Copy bytes without reading them; return how many, from the first. Raises OSError."""

    def clone(  # noqa: PLR0917
        self, source: int, offset: int, target: int, at: int, nbytes: int, block: int
    ) -> tuple[int, int]:
        """Share blocks with the source; return what is in place: [first, last) of the bytes."""
        return 0, 0


class KernelCopy(CopyMethod):
    """The kernel copies: copy_file_range(2)."""

    name = "copy_file_range"

    def probe(self, source: int, size: int, scratch: int, block: int) -> bool:
        """Copy one byte."""
        return bool(size) and copy_in_kernel(source, 0, scratch, 0, 1) == 1

    def copy(self, source: int, offset: int, target: int, at: int, nbytes: int) -> int:
        """Copy until the kernel refuses."""
        return copy_in_kernel(source, offset, target, at, nbytes)


class Reflink(KernelCopy):
    """Both files share blocks until one is written to; the kernel copies what cannot be shared."""

    name = "reflink"
    shares_blocks = True

    def probe(self, source: int, size: int, scratch: int, block: int) -> bool:
        """Clone one block."""
        if size < block:
            return False
        os.truncate(scratch, block)
        return clone_range(source, 0, scratch, 0, block)

    def clone(  # noqa: PLR0917
        self, source: int, offset: int, target: int, at: int, nbytes: int, block: int
    ) -> tuple[int, int]:
        """Share the whole blocks, if they are aligned alike on both sides."""
        first, last = whole_blocks(offset, at, nbytes, block)
        if first == last:
            return 0, 0
        done = clone_range(source, offset + first, target, at + first, last - first)
        return (first, last) if done else (0, 0)


class ReadWrite(CopyMethod):
    """Read into a buffer and write from it; always works."""

    name = "read and write"
    reads_bytes = True

    def probe(self, source: int, size: int, scratch: int, block: int) -> bool:
        """Nothing to try."""
        return True

    def copy(self, source: int, offset: int, target: int, at: int, nbytes: int) -> int:
        """Copy nothing: all bytes are to be read."""
        return 0


REFLINK: Final = Reflink()
KERNEL: Final = KernelCopy()
BUFFER: Final = ReadWrite()
_BEST_FIRST: Final = (REFLINK, KERNEL, BUFFER)


def whole_blocks(offset: int, at: int, nbytes: int, block: int) -> tuple[int, int]:
    """Return which bytes of a run from `offset` to `at` are whole blocks on both sides.

    [first, last) of the run; empty where the two sides are not aligned alike.
    """
    if (offset - at) % block:
        return 0, 0
    first, last = -at % block, nbytes - (at + nbytes) % block
    return (first, last) if first < last else (0, 0)


@dataclass(slots=True)
class Tally:
    """How many bytes went which way; several workers add to it at once."""

    cloned: int = 0
    copied: int = 0  # in the kernel
    direct: int = 0  # from a buffer, past the page cache
    written: int = 0  # from a buffer, through the page cache
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def add(self, *, cloned: int = 0, copied: int = 0, direct: int = 0, written: int = 0) -> None:
        """Add bytes."""
        with self._lock:
            self.cloned += cloned
            self.copied += copied
            self.direct += direct
            self.written += written


@dataclass(slots=True)
class CopyMethods:
    """The best method from the file system of each source file to that of OUT, and the tally."""

    out: Path
    block: int = PAGE_BYTES
    tally: Tally = field(default_factory=Tally)
    found: dict[int, CopyMethod] = field(default_factory=dict)  # by the source's st_dev
    devices: tuple[int, ...] = ()  # of the source's files

    @property
    def names(self) -> list[str]:
        """The names of the methods that were found, sorted."""
        return sorted({method.name for method in self.found.values()})

    @property
    def share_blocks(self) -> bool:
        """Whether blocks of any source file can be shared."""
        return any(method.shares_blocks for method in self.found.values())

    def probe(self, sources: Iterable[Path]) -> None:
        """Find the method for each file system that these files are on, before any byte is copied.

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
                    self.found[devices[-1]] = self._best(descriptor)
        self.devices = tuple(devices)

    def of_file(self, number: int) -> CopyMethod:
        """Return the method for a source file; `probe` was called for all of them."""
        return self.found.get(self.devices[number], BUFFER) if self.devices else BUFFER

    def _best(self, source: int) -> CopyMethod:
        """Try the methods on a scratch file beside the output."""
        with _scratch(self.out) as scratch, writing(self.out):
            self.block = max(os.fstatvfs(scratch).f_bsize, PAGE_BYTES)
            size = os.fstat(source).st_size
            return next(m for m in _BEST_FIRST if m.probe(source, size, scratch, self.block))


@contextmanager
def _scratch(out: Path) -> Iterator[int]:
    path = partial_path(out, "probe")
    with writing(path):
        descriptor = os.open(path, NEW_FILE, 0o600)
    try:
        yield descriptor
    finally:
        with suppress(OSError):  # what was in it does not matter
            os.close(descriptor)
        path.unlink(missing_ok=True)
