"""Letting the disk begin on what is written, while the file still grows."""

from __future__ import annotations

import queue
import threading

from moeconv.engine.syscalls import start_writeback


class Writeback:
    """One file's early writeback, in a thread of its own.

    btrfs finds room for bytes and sums them in the thread that asks for their writeback: a worker
    would stand still meanwhile, and a fsync at the end would do all of it at once.
    """

    def __init__(self, descriptor: int) -> None:
        self._descriptor = descriptor
        self._ranges: queue.SimpleQueue[tuple[int, int] | None] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._work, daemon=True)
        self._thread.start()

    def begin(self, offset: int, nbytes: int) -> None:
        """Let the disk begin on these bytes, soon."""
        self._ranges.put((offset, nbytes))

    def end(self) -> None:
        """Wait until all was begun; the descriptor may be closed then."""
        self._ranges.put(None)
        self._thread.join()

    def _work(self) -> None:
        while (asked := self._ranges.get()) is not None:
            start_writeback(self._descriptor, *asked)
