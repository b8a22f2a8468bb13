"""BufferPool for permuting tiles: bounded over all workers, and used again from tile to tile.

New pages cost more than the work done in them, and the C library keeps what each thread frees:
so blocks are mapped once and handed from tile to tile.
"""

from __future__ import annotations

import ctypes
import mmap
import threading
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Final, TypeAlias

from moeconv.core.text import human_size
from moeconv.errors import MemoryShort

Allocate: TypeAlias = Callable[[int], memoryview]
PAGE_BYTES: Final = 4096


def paged(nbytes: int) -> int:
    """The size of the block that holds so many bytes."""
    return max(-(-nbytes // PAGE_BYTES), 1) * PAGE_BYTES


def mapped(size: int) -> mmap.mmap:
    """New memory of this process alone, zeroed, from the start of a page. Raises MemoryShort."""
    try:
        return mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    except (OSError, MemoryError):
        raise MemoryShort(
            f"cannot allocate another {human_size(size)} of memory",
            cause="memory is full, or this process has a limit",
            fix="use fewer `--jobs` or a smaller `--max-memory`",
        ) from None


def begins_page(view: memoryview) -> bool:
    """Whether a view's first byte is the first of a page of memory; only writable ones can tell."""
    return not view.readonly and ctypes.addressof(ctypes.c_char.from_buffer(view)) % PAGE_BYTES == 0


class BufferPool:
    """At most `limit` bytes of blocks at once; a tile that needs more gets it alone."""

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self._held = 0
        self._blocks: list[mmap.mmap] = []  # free, the one that was used last at the end
        self._mapped = 0
        self._waiting: deque[object] = deque()
        self._changed = threading.Condition()

    @contextmanager
    def hold(self, nbytes: int) -> Iterator[Allocate]:
        """Wait for room for blocks of so many bytes in all, first come, first served.

        Yields a function that gives a block, of whole pages, for so many bytes; what is in it is
        of no account, and it must not be used after the block ends.
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
        """Unmap free blocks, those that were not used for longest, until so much is mapped."""
        while self._blocks and self._mapped > most:
            self._mapped -= len(self._blocks.pop(0))
