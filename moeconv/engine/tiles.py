"""Carrying out tiles: source bytes through one reused buffer into the output, hashed in passing."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Final, Protocol, TypeAlias

import numpy as np

from moeconv.digest import digest, hasher
from moeconv.engine.sources import Sources
from moeconv.engine.weave import memory_of, weave
from moeconv.errors import MoeconvError, quoted
from moeconv.plan.values import CopyTile, OutputFile, Span, Tile, WeaveTile

# fits the second-level cache: larger buffers copy slower, smaller ones pay more calls
BUFFER_BYTES: Final = 1024 * 1024

# from this size on a tile is copied by itself, in the kernel where that is possible
LARGE_TILE_BYTES: Final = 256 * 1024

Origin: TypeAlias = tuple[int, int]
Digests: TypeAlias = "list[list[str]]"


class Write(Protocol):
    """Takes bytes that belong at `offset`; `origin` says where else they stand."""

    def __call__(self, view: memoryview, offset: int, origin: Origin | None = None) -> None:
        """Take them."""


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
            if isinstance(tile, CopyTile) and tile.nbytes < LARGE_TILE_BYTES:
                if filled + tile.nbytes > BUFFER_BYTES:
                    self._flush(write, at, filled)
                    at, filled = tile.start, 0
                self._small(tile, digests, filled)
                filled += tile.nbytes
                continue
            self._flush(write, at, filled)
            if isinstance(tile, WeaveTile):
                self._weave(file, tile, digests, write)
            else:
                self._large(tile, digests, write)
            at, filled = tile.start + tile.nbytes, 0
        self._flush(write, at, filled)

    def _small(self, tile: CopyTile, digests: Digests, filled: int) -> None:
        """Gather: many scales and norms make one write."""
        view = self._buffer[filled : filled + tile.nbytes]
        self._sources.read_into(tile.file, view, tile.offset)
        digests[tile.tensor][tile.unit] = digest(view)

    def _large(self, tile: CopyTile, digests: Digests, write: Write) -> None:
        """Read a piece, hash it, and copy it while it is still in the cache."""
        state = hasher()
        source = self._sources.descriptor(tile.file)
        for done in range(0, tile.nbytes, BUFFER_BYTES):
            self._refuse_stopped()
            view = self._buffer[: min(BUFFER_BYTES, tile.nbytes - done)]
            self._sources.read_into(tile.file, view, tile.offset + done)
            state.update(view)
            write(view, tile.start + done, (source, tile.offset + done))
            self._advance(len(view))
        digests[tile.tensor][tile.unit] = state.hexdigest()

    def _refuse_stopped(self) -> None:
        if self._stop.is_set():
            raise Stopped

    def _flush(self, write: Write, at: int, filled: int) -> None:
        self._refuse_stopped()
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
