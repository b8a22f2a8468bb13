"""A worker's buffer: bytes that follow one another in the target become one write."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Final, Protocol

from moeconv.engine.copy.buffers import PAGE_BYTES, mapped

# fits the second-level cache: larger buffers copy slower, smaller ones pay more calls
BUFFER_BYTES: Final = 1024 * 1024


class Writes(Protocol):
    """Where collected bytes go."""

    def write(self, view: memoryview, offset: int) -> None:
        """Take bytes that belong at `offset`."""


class WriteCombiner:
    """Small pieces wait here until one comes that does not follow, or finds no room.

    Bytes stand in their page of memory as they will in the target's, as writing past the page
    cache asks for.
    """

    def __init__(self) -> None:
        self._buffer = memoryview(mapped(BUFFER_BYTES))
        self._at = 0  # where in the target the first byte belongs
        self._first = self._last = 0  # what waits

    def place(self, target: Writes, at: int, nbytes: int) -> memoryview:
        """Where to put the bytes that belong at `at`; a page less than BUFFER_BYTES at most."""
        if self._last + nbytes > BUFFER_BYTES or at != self._at + self._last - self._first:
            self.flush(target)
            self._at = at
            self._first = self._last = at % PAGE_BYTES
        view = self._buffer[self._last : self._last + nbytes]
        self._last += nbytes
        return view

    def whole(self, target: Writes) -> memoryview:
        """The whole buffer, for somebody who empties it before the next call, cut by `pieces`."""
        self.flush(target)
        return self._buffer

    def flush(self, target: Writes) -> None:
        """Write what waits. Raises what the target raises."""
        if self._first < self._last:
            target.write(self._buffer[self._first : self._last], self._at)
            self._at += self._last - self._first
        self._first = self._last = self._at % PAGE_BYTES


def pieces(at: int, nbytes: int) -> Iterator[tuple[int, int, int]]:
    """A run that begins at `at`, cut for a buffer: bytes before it, its size, where in the buffer.

    All but the last end with a page of the target.
    """
    done = 0
    while done < nbytes:
        first = (at + done) % PAGE_BYTES
        size = min(BUFFER_BYTES - first, nbytes - done)
        yield done, size, first
        done += size
