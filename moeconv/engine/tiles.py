"""Carrying out tiles: source bytes through one reused buffer into the output, hashed in passing."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Final, TypeAlias

import numpy as np

from moeconv.digest import digest, hasher
from moeconv.engine.sources import Sources
from moeconv.engine.weave import memory_of, weave
from moeconv.errors import MoeconvError, quoted
from moeconv.plan.values import CopyTile, OutputFile, Span, Tile, WeaveTile

# fits the second-level cache: larger buffers copy slower, smaller ones pay more calls
BUFFER_BYTES: Final = 1024 * 1024

Write: TypeAlias = Callable[[memoryview, int], None]
Digests: TypeAlias = "list[list[str]]"


class Stopped(Exception):
    """Another worker failed or the user interrupted: stop without a word."""


class Budget:
    """At most `limit` bytes in weaves at once; one that is larger goes alone."""

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self._used = 0
        self._changed = threading.Condition()

    @contextmanager
    def hold(self, nbytes: int) -> Iterator[None]:
        """Wait for room, then hold it."""
        with self._changed:
            self._changed.wait_for(lambda: not self._used or self._used + nbytes <= self._limit)
            self._used += nbytes
        try:
            yield
        finally:
            with self._changed:
                self._used -= nbytes
                self._changed.notify_all()


class TileRunner:
    """One worker's buffer, and the loop that fills and empties it."""

    def __init__(
        self,
        sources: Sources,
        budget: Budget,
        *,
        stop: threading.Event,
        advance: Callable[[int], None],
    ) -> None:
        self._sources = sources
        self._budget = budget
        self._stop = stop
        self._advance = advance
        self._buffer = memoryview(bytearray(BUFFER_BYTES))

    def run(
        self, file: OutputFile, tiles: tuple[Tile, ...], digests: Digests, write: Write
    ) -> None:
        """Carry out consecutive tiles of a file; `digests[tensor][unit]` receives the digests.

        Raises IoFailed, SourceChanged, UnequalShared; Stopped when told to.
        """
        at = tiles[0].start
        filled = 0
        for tile in tiles:
            if isinstance(tile, WeaveTile):
                self._flush(write, at, filled)
                self._weave(file, tile, digests, write)
                at, filled = tile.start + tile.nbytes, 0
                continue
            at, filled = self._copy(tile, digests, write, at, filled)
        self._flush(write, at, filled)

    def _copy(
        self, tile: CopyTile, digests: Digests, write: Write, at: int, filled: int
    ) -> tuple[int, int]:
        state = None
        done = 0
        while done < tile.nbytes:
            count = min(tile.nbytes - done, BUFFER_BYTES - filled)
            view = self._buffer[filled : filled + count]
            self._sources.read_into(tile.file, view, tile.offset + done)
            if count == tile.nbytes:
                digests[tile.tensor][tile.unit] = digest(view)
            else:
                state = state or hasher()
                state.update(view)
            done += count
            filled += count
            if filled == BUFFER_BYTES:
                self._flush(write, at, filled)
                at, filled = at + filled, 0
        if state is not None:
            digests[tile.tensor][tile.unit] = state.hexdigest()
        return at, filled

    def _flush(self, write: Write, at: int, filled: int) -> None:
        if self._stop.is_set():
            raise Stopped
        if filled:
            write(self._buffer[:filled], at)
            self._advance(filled)

    def _weave(self, file: OutputFile, tile: WeaveTile, digests: Digests, write: Write) -> None:
        with self._budget.hold(memory_of(tile)):
            try:
                data, units = weave(tile, self._read_span)
            except MoeconvError as problem:
                problem.at = problem.at or quoted(file.tensors[tile.tensor].name)
                raise
            for unit, value in units:
                digests[tile.tensor][unit] = value
            write(data, tile.start)
            self._advance(tile.nbytes)

    def _read_span(self, span: Span) -> memoryview:
        # numpy's memory is aligned for every item size; a bytearray would be zeroed first
        view = np.empty(span.nbytes, dtype=np.uint8).data
        self._sources.read_into(span.file, view, span.offset)
        return view
