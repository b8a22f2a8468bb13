"""Buffers: a bounded pool for permuting tiles, and one per worker that combines small writes.

Fresh pages cost more than the work done in them, and the C library keeps what each thread frees,
so blocks are mapped once and reused from tile to tile.
"""

from __future__ import annotations

import ctypes
import mmap
import threading
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Final, Protocol, TypeAlias

from moeconv.core.text import human_size
from moeconv.errors import MemoryShort

Allocate: TypeAlias = Callable[[int], memoryview]
PAGE_BYTES: Final = 4096

# fits the second-level cache: larger buffers copy slower, smaller ones pay more calls
BUFFER_BYTES: Final = 1024 * 1024


def paged(nbytes: int) -> int:
    """Return a size rounded up to whole pages, at least one."""
    return max(-(-nbytes // PAGE_BYTES), 1) * PAGE_BYTES


def mapped(size: int) -> mmap.mmap:
    """Map zeroed, private memory, aligned to a page. Raises MemoryShort."""
    try:
        return mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    except (OSError, MemoryError):
        raise MemoryShort(
            f"cannot allocate another {human_size(size)} of memory",
            cause="memory is full, or this process has reached its limit",
            fix="use fewer `--jobs` or a smaller `--max-memory`",
        ) from None


def begins_page(view: memoryview) -> bool:
    """Return whether a view is aligned to a page of memory; False for read-only views."""
    return not view.readonly and ctypes.addressof(ctypes.c_char.from_buffer(view)) % PAGE_BYTES == 0


class BufferPool:
    """A pool of at most `limit` bytes; a tile that needs more waits until it is the only one."""

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self._held = 0
        self._blocks: list[mmap.mmap] = []  # free, the one that was used last at the end
        self._mapped = 0
        self._waiting: deque[object] = deque()
        self._changed = threading.Condition()

    @contextmanager
    def hold(self, nbytes: int) -> Iterator[Allocate]:
        """Wait, first come, first served, until `nbytes` in all can be allocated.

        Yields a function that allocates so many bytes, aligned to a page and not zeroed; they must
        not be used after the `with` block.
        """
        ticket, taken = object(), list[mmap.mmap]()

        def take(size: int) -> memoryview:
            block = self._block(paged(size))
            taken.append(block)
            return memoryview(block)[:size]

        with self._changed:
            self._waiting.append(ticket)
            try:
                self._changed.wait_for(lambda: self._waiting[0] is ticket and self._fits(nbytes))
                self._held += nbytes
            finally:
                self._waiting.remove(ticket)
                self._changed.notify_all()
        try:
            yield take
        finally:
            with self._changed:
                self._held -= nbytes
                self._blocks += taken
                self._drop(self._limit)
                self._changed.notify_all()

    def _fits(self, nbytes: int) -> bool:
        return not self._held or self._held + nbytes <= self._limit

    def _block(self, size: int) -> mmap.mmap:
        with self._changed:
            for number in range(len(self._blocks) - 1, -1, -1):
                if len(self._blocks[number]) == size:
                    return self._blocks.pop(number)
            self._drop(self._limit - size)
            block = mapped(size)
            self._mapped += size
            return block

    def _drop(self, most: int) -> None:
        """Unmap free blocks, least recently used first, until at most `most` bytes are mapped."""
        while self._blocks and self._mapped > most:
            self._mapped -= len(self._blocks.pop(0))


class Writes(Protocol):
    """The target of collected bytes."""

    def write(self, view: memoryview, offset: int) -> None:
        """Take bytes that belong at `offset`."""


class WriteCombiner:
    """A worker's buffer; it is written when a piece is not contiguous or does not fit.

    Buffer and target offset are kept congruent modulo the page size, as O_DIRECT requires.
    """

    def __init__(self) -> None:
        self._buffer = memoryview(mapped(BUFFER_BYTES))
        self._at = 0  # target offset of the first buffered byte
        self._first = self._last = 0  # which bytes of the buffer are to be written

    def place(self, target: Writes, at: int, nbytes: int) -> memoryview:
        """Return the view to fill with the bytes of target offset `at`.

        nbytes: at most BUFFER_BYTES - PAGE_BYTES.
        """
        if self._last + nbytes > BUFFER_BYTES or at != self._at + self._last - self._first:
            self.flush(target)
            self._at = at
            self._first = self._last = at % PAGE_BYTES
        view = self._buffer[self._last : self._last + nbytes]
        self._last += nbytes
        return view

    def whole(self, target: Writes) -> memoryview:
        """Return the whole, empty buffer to use with `pieces`; it is not written by `flush`."""
        self.flush(target)
        return self._buffer

    def flush(self, target: Writes) -> None:
        """Write the buffered bytes. Raises what the target raises."""
        if self._first < self._last:
            target.write(self._buffer[self._first : self._last], self._at)
            self._at += self._last - self._first
        self._first = self._last = self._at % PAGE_BYTES


def pieces(at: int, nbytes: int) -> Iterator[tuple[int, int, int]]:
    """Cut a run at target offset `at` to fit a buffer: yield (offset in run, size, buffer offset).

    All pieces but the last end at a page boundary of the target.
    """
    done = 0
    while done < nbytes:
        first = (at + done) % PAGE_BYTES
        size = min(BUFFER_BYTES - first, nbytes - done)
        yield done, size, first
        done += size
