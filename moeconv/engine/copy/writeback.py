"""Letting the disk begin on what is written, while the file still grows."""

from __future__ import annotations

import queue
import threading
from typing import Final

from moeconv.engine.copy.syscalls import drop_cached, start_writeback

# what the disk is still busy with stays in memory in any case; to ask for it costs a walk
BEHIND_BYTES: Final = 192 * 1024 * 1024


class Writeback:
    """One file's early writeback, in a thread of its own. A hint: what is left, fsync does.

    btrfs finds room for bytes and sums them in the thread that asks for their writeback: a worker
    would stand still meanwhile, and a fsync at the end would do all of it at once. What is on the
    disk leaves the page cache, so that the next bytes find memory that was just in use: new pages
    cost more than what is copied to them, and those of others stay.
    """

    def __init__(self, descriptor: int, first: int) -> None:
        """first: where the first range will begin."""
        self._descriptor = descriptor
        self._whole = first  # up to here all is written, and the disk has begun on it
        self._begun: dict[int, int] = {}  # beyond that: start and stop of ranges
        self._ranges: queue.SimpleQueue[tuple[int, int] | None] = queue.SimpleQueue()
        self._over = threading.Event()
        self._ended = threading.Event()
        try:
            threading.Thread(target=self._work, daemon=True).start()
        except RuntimeError:  # the system has no thread more
            self._over.set()
            self._ended.set()

    def begin(self, offset: int, nbytes: int) -> None:
        """Let the disk begin on these bytes, soon."""
        self._ranges.put((offset, nbytes))

    def end(self) -> None:
        """Leave what waits to fsync; when the range at hand is begun, the descriptor is free."""
        self._over.set()
        self._ranges.put(None)
        # not `join`: before 3.13 it takes a thread for dead when a signal comes
        self._ended.wait()

    def _work(self) -> None:
        try:
            while (asked := self._ranges.get()) is not None and not self._over.is_set():
                start_writeback(self._descriptor, *asked)
                self._begun[asked[0]] = sum(asked)
                # no further: of what still fills up, pages would have to be read again
                while (stop := self._begun.pop(self._whole, None)) is not None:
                    self._whole = stop
                if (behind := self._whole - BEHIND_BYTES) > 0:
                    drop_cached(self._descriptor, behind)
        finally:
            self._ended.set()
