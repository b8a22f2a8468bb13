"""A worker's buffer: bytes that follow one another in the target become one write."""

from __future__ import annotations

from typing import Final, Protocol

from moeconv.engine.memory import mapped

# fits the second-level cache: larger buffers copy slower, smaller ones pay more calls
BUFFER_BYTES: Final = 1024 * 1024


class Writes(Protocol):
    """Where collected bytes go."""

    def write(self, view: memoryview, offset: int) -> None:
        """Take bytes that belong at `offset`."""


class Gather:
    """Small pieces wait here until one comes that does not follow, or finds no room."""

    def __init__(self) -> None:
        # pages of its own, as writing past the page cache asks for
        self._buffer = memoryview(mapped(BUFFER_BYTES))
        self._at = 0
        self._filled = 0

    def place(self, target: Writes, at: int, nbytes: int) -> memoryview:
        """Where to put the bytes that belong at `at`, at most BUFFER_BYTES of them."""
        if self._filled + nbytes > BUFFER_BYTES or at != self._at + self._filled:
            self.flush(target)
            self._at = at
        view = self._buffer[self._filled : self._filled + nbytes]
        self._filled += nbytes
        return view

    def whole(self, target: Writes) -> memoryview:
        """The whole buffer, for somebody who empties it before the next call."""
        self.flush(target)
        return self._buffer

    def flush(self, target: Writes) -> None:
        """Write what waits. Raises what the target raises."""
        if self._filled:
            target.write(self._buffer[: self._filled], self._at)
        self._at += self._filled
        self._filled = 0
