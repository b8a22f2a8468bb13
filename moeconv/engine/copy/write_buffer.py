"""Collect small pieces that are contiguous in the target into one write."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Final, Protocol

from moeconv.engine.copy.buffers import PAGE_BYTES, mapped

# fits the second-level cache: larger buffers copy slower, smaller ones pay more calls
BUFFER_BYTES: Final = 1024 * 1024


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
