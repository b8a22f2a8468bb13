"""One worker's loop over tiles: from the source through one reused buffer into a sink, hashed."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Final

from moeconv.core.digest import digest, hasher
from moeconv.engine.copy.buffers import BufferPool, WriteCombiner, pieces
from moeconv.engine.copy.sink import LATER, TAKE, DigestPlan, Digests, Sink
from moeconv.errors import MoeconvError, quoted
from moeconv.plan.model import CopyTile, OutputFile, PermuteTile, Span, Tile
from moeconv.store.open_files import OpenFiles

# A larger copy gets calls of its own, in the kernel where that is possible.
LARGE_TILE_BYTES: Final = 256 * 1024

# A clone takes as long as a copy of this size.
CLONED_TILE_BYTES: Final = 16 * 1024

# Copies without reading: large enough for few calls, small enough to stop between two.
KERNEL_COPY_BYTES: Final = 64 * 1024 * 1024


class Stopped(Exception):
    """Another worker failed or the user interrupted: stop without an error."""


class TileRunner:
    """One worker with its own buffer and its own open source file."""

    def __init__(
        self,
        sources: OpenFiles,
        memory: BufferPool,
        *,
        stop: threading.Event,
        advance: Callable[[int], None],
    ) -> None:
        self._source = sources.reader()
        self._memory = memory
        self._stop = stop
        self._advance = advance
        self._combiner = WriteCombiner()

    def close(self) -> None:
        """Release the source file that was read last."""
        self._source.close()

    def run(
        self,
        file: OutputFile,
        tiles: tuple[Tile, ...],
        digests: Digests,
        sink: Sink,
        policy: DigestPlan,
    ) -> None:
        """Carry out consecutive tiles of a file; `digests[tensor][unit]` receives the digests.

        policy: which digests are taken. Bytes whose digests are known, or are left for later, are
        not read where they can be cloned or copied without it.
        Raises IoFailed, SourceChanged, UnequalShared; Stopped when told to.
        """
        number = alone = 0
        large = CLONED_TILE_BYTES if sink.clones else LARGE_TILE_BYTES
        while number < len(tiles):
            self._refuse_stopped()
            tile, number = tiles[number], number + 1
            if isinstance(tile, CopyTile) and tile.nbytes < large:
                self._copy_small(tile, digests, sink, policy)
            elif isinstance(tile, CopyTile):
                several: list[CopyTile] = []
                if sink.clones and number > alone:
                    several = _adjacent_copies(tiles, number - 1, policy)
                run = Span(tile.file, tile.offset, sum(t.nbytes for t in several))
                units = [(t.tensor, t.unit) for t in several]
                if len(several) > 1 and self._copy_unhashed(
                    run, tile.start, units, digests, sink, policy
                ):
                    number += len(several) - 1
                else:
                    alone = max(alone, number + len(several) - 1)  # all of them were tried
                    self._copy_large(tile, digests, sink, policy)
            else:
                units = [(tile.tensor, p.unit) for p in tile.pieces]
                if not tile.is_identity or not self._copy_unhashed(
                    tile.spans[0], tile.start, units, digests, sink, policy
                ):
                    self._permute(file, tile, digests, sink)
        self._combiner.flush(sink)

    def _copy_unhashed(  # noqa: PLR0917
        self,
        run: Span,
        at: int,
        units: list[tuple[int, int]],
        digests: Digests,
        sink: Sink,
        policy: DigestPlan,
    ) -> bool:
        """Clone or copy a run of whole units, (tensor, unit) each; False if it must be read."""
        wanted = [policy(*unit) for unit in units]
        if TAKE in wanted:
            return False
        cloned = sink.clone(self._source.file(run.file), run.offset, at, run.nbytes)
        if cloned[0] == cloned[1] and any(how is not LATER for how in wanted):
            return False  # bytes that are copied anyway are compared with their known digests
        for (tensor, unit), how in zip(units, wanted, strict=True):
            digests[tensor][unit] = how.value
        self._copy_around(cloned, run.file, run.offset, at, run.nbytes, sink)
        return True

    def _copy_small(self, tile: CopyTile, digests: Digests, sink: Sink, policy: DigestPlan) -> None:
        """Copy into the buffer, where many scales and norms become one write."""
        view = self._combiner.place(sink, tile.start, tile.nbytes)
        self._source.read_into(tile.file, view, tile.offset)
        # whether a tile is small depends on the file system; whether it has a digest must not
        later = policy(tile.tensor, tile.unit) is LATER
        digests[tile.tensor][tile.unit] = "" if later else digest(view)
        self._advance(tile.nbytes)

    def _copy_large(self, tile: CopyTile, digests: Digests, sink: Sink, policy: DigestPlan) -> None:
        """Clone what can be cloned; read, hash and copy the rest, a piece at a time."""
        source = self._source.file(tile.file)
        first, last = sink.clone(source, tile.offset, tile.start, tile.nbytes)
        unit = policy(tile.tensor, tile.unit)
        # bytes that are copied anyway are compared with a known digest; cloned ones are not read
        if unit is LATER or (unit is not TAKE and last > first):
            digests[tile.tensor][tile.unit] = unit.value
            self._copy_around((first, last), tile.file, tile.offset, tile.start, tile.nbytes, sink)
            return
        state = hasher()
        buffer = self._combiner.whole(sink)
        for done, size, place in pieces(tile.start, tile.nbytes):
            self._refuse_stopped()
            view = buffer[place : place + size]
            self._source.read_into(tile.file, view, tile.offset + done)
            state.update(view)
            for start, stop in _outside(done, done + len(view), first, last):
                origin = (source, tile.offset + start)
                sink.write(view[start - done : stop - done], tile.start + start, origin)
            self._advance(len(view))
        digests[tile.tensor][tile.unit] = state.hexdigest()

    def _copy_around(  # noqa: PLR0917
        self, cloned: tuple[int, int], file: int, offset: int, at: int, nbytes: int, sink: Sink
    ) -> None:
        """Copy the bytes of a run beside those that were cloned, without hashing them."""
        first, last = cloned
        done = last - first
        for start, stop in ((0, first), (last, nbytes)):
            if stop - start < LARGE_TILE_BYTES:  # the edges of adjacent clones become one write
                if start < stop:
                    view = self._combiner.place(sink, at + start, stop - start)
                    self._source.read_into(file, view, offset + start)
                done += stop - start
            else:
                self._copy_unread(file, offset + start, at + start, stop - start, sink)
        self._advance(done)

    def _copy_unread(self, file: int, offset: int, at: int, nbytes: int, sink: Sink) -> None:
        """Copy bytes without hashing them, in the kernel as far as it does."""
        done, buffer = 0, self._combiner.whole(sink)
        source = self._source.file(file)
        while done < nbytes:
            self._refuse_stopped()
            size = min(KERNEL_COPY_BYTES, nbytes - done)
            count = sink.copy(source, offset + done, at + done, size)
            if not count:
                _, count, place = next(pieces(at + done, nbytes - done))
                view = buffer[place : place + count]
                self._source.read_into(file, view, offset + done)
                sink.write(view, at + done)
            done += count
            self._advance(count)

    def _refuse_stopped(self) -> None:
        if self._stop.is_set():
            raise Stopped

    def _permute(self, file: OutputFile, tile: PermuteTile, digests: Digests, sink: Sink) -> None:
        from moeconv.engine.copy.permute import (  # importing NumPy takes longer than planning
            memory_of,
            permute,
        )

        first = last = 0
        if tile.is_identity:  # cloned where possible, and read for its digests only
            span = tile.spans[0]
            source = self._source.file(span.file)
            first, last = sink.clone(source, span.offset, tile.start, tile.nbytes)
        with self._memory.hold(memory_of(tile)) as take:
            try:
                data, units = permute(tile, self._read_span, take)
            except MoeconvError as problem:
                problem.at = problem.at or quoted(file.tensors[tile.tensor].name)
                raise
            for unit, value in units:
                digests[tile.tensor][unit] = value
            for start, stop in _outside(0, tile.nbytes, first, last):
                sink.write(data[start:stop], tile.start + start)
            self._advance(tile.nbytes)

    def _read_span(self, span: Span, view: memoryview) -> memoryview:
        self._source.read_into(span.file, view, span.offset)
        return view


def _outside(start: int, stop: int, first: int, last: int) -> list[tuple[int, int]]:
    """Return the parts of [start, stop) that are not in [first, last)."""
    if last <= start or stop <= first:
        return [(start, stop)]
    parts = [(start, first), (last, stop)]
    return [(a, b) for a, b in parts if start <= a < b <= stop]


def _adjacent_copies(tiles: tuple[Tile, ...], number: int, policy: DigestPlan) -> list[CopyTile]:
    """Return the copies from `number` on that are one run on both sides, with no digest to take."""
    found: list[CopyTile] = []
    for tile in tiles[number:]:
        if not isinstance(tile, CopyTile) or policy(tile.tensor, tile.unit) is TAKE:
            break
        if found and (tile.file, tile.offset - found[-1].offset, tile.start - found[-1].start) != (
            found[-1].file,
            found[-1].nbytes,
            found[-1].nbytes,
        ):
            break
        found.append(tile)
    return found
