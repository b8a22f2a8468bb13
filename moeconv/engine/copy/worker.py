"""Carrying out tiles: source bytes through one reused buffer into the output, hashed in passing."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Final, Protocol, TypeAlias

from moeconv.core.digest import digest, hasher
from moeconv.engine.copy.buffers import Memory
from moeconv.engine.copy.sources import SourceFile, Sources
from moeconv.engine.copy.write_buffer import WriteCombiner, pieces
from moeconv.errors import MoeconvError, quoted
from moeconv.plan.model import CopyTile, OutputFile, Span, Tile, WeaveTile

# from this size on bytes are copied by themselves, in the kernel where that is possible
LARGE_TILE_BYTES: Final = 256 * 1024

# a clone costs as much as a small copy
CLONED_TILE_BYTES: Final = 16 * 1024

# in the kernel, unread: large enough to cost few calls, small enough to be stopped between two
KERNEL_COPY_BYTES: Final = 64 * 1024 * 1024

Origin: TypeAlias = tuple[SourceFile, int]
Digests: TypeAlias = "list[list[str]]"


Promised: TypeAlias = Callable[[int, int], "str | None"]  # (tensor, unit) -> its digest


class Bytes(Protocol):
    """Where the bytes of one file go: to a disk, to a comparison, or nowhere."""

    @property
    def clones(self) -> bool:
        """Whether `clone` may do anything."""

    def write(self, view: memoryview, offset: int, origin: Origin | None = None) -> None:
        """Take bytes that belong at `offset`; several workers may call it at once.

        origin: a file of the source, and the offset in it where the same bytes stand.
        """

    def copy(self, source: SourceFile, offset: int, at: int, nbytes: int) -> int:
        """Take bytes from a source file unread; how many from the first on were taken."""

    def clone(self, source: SourceFile, offset: int, at: int, nbytes: int) -> tuple[int, int]:
        """Take what can be had without a copy: [first, last) of these bytes."""


class Stopped(Exception):
    """Another worker failed or the user interrupted: stop without a word."""


class TileRunner:
    """One worker: the loop that fills and empties its buffer."""

    def __init__(
        self,
        sources: Sources,
        memory: Memory,
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
        """Let go of the source's file that was read last."""
        self._source.close()

    def run(
        self,
        file: OutputFile,
        tiles: tuple[Tile, ...],
        digests: Digests,
        target: Bytes,
        promised: Promised,
    ) -> None:
        """Carry out consecutive tiles of a file; `digests[tensor][unit]` receives the digests.

        promised: digests that need not be taken again where the bytes are not read anyway; empty
        ones for whoever wants none.
        Raises IoFailed, SourceChanged, UnequalShared; Stopped when told to.
        """
        number = alone = 0
        large = CLONED_TILE_BYTES if target.clones else LARGE_TILE_BYTES
        while number < len(tiles):
            self._refuse_stopped()
            tile, number = tiles[number], number + 1
            if isinstance(tile, CopyTile) and tile.nbytes < large:
                self._small(tile, digests, target, promised)
            elif isinstance(tile, CopyTile):
                several: list[CopyTile] = []
                if target.clones and number > alone:
                    several = _adjacent_copies(tiles, number - 1, promised)
                if len(several) > 1 and self._clone_several(several, digests, target, promised):
                    number += len(several) - 1
                else:
                    alone = max(alone, number + len(several) - 1)  # asked once for all of them
                    self._large(tile, digests, target, promised)
            elif not (tile.straight and self._straight(tile, digests, target, promised)):
                self._weave(file, tile, digests, target)
        self._combiner.flush(target)

    def _clone_several(
        self, tiles: list[CopyTile], digests: Digests, target: Bytes, promised: Promised
    ) -> bool:
        """Clone tiles that follow one another on both sides, their digests all promised."""
        head, nbytes = tiles[0], sum(tile.nbytes for tile in tiles)
        values = [promised(tile.tensor, tile.unit) or "" for tile in tiles]
        source = self._source.file(head.file)
        first, last = target.clone(source, head.offset, head.start, nbytes)
        if last == first and any(values):
            return False  # to be copied, and held against its promise
        for tile, value in zip(tiles, values, strict=True):
            digests[tile.tensor][tile.unit] = value
        self._beside((first, last), head.file, head.offset, head.start, nbytes, target)
        return True

    def _small(self, tile: CopyTile, digests: Digests, target: Bytes, promised: Promised) -> None:
        """WriteCombiner: many scales and norms make one write."""
        view = self._combiner.place(target, tile.start, tile.nbytes)
        self._source.read_into(tile.file, view, tile.offset)
        # what is small depends on the file system, and whose digest comes later must not
        later = promised(tile.tensor, tile.unit) == ""
        digests[tile.tensor][tile.unit] = "" if later else digest(view)
        self._advance(tile.nbytes)

    def _large(self, tile: CopyTile, digests: Digests, target: Bytes, promised: Promised) -> None:
        """Clone what can be cloned; read, hash and copy the rest, a piece at a time."""
        source = self._source.file(tile.file)
        first, last = target.clone(source, tile.offset, tile.start, tile.nbytes)
        value = promised(tile.tensor, tile.unit)
        # what is copied anyway is held against the promise; what is not, need not be read
        if value is not None and (last > first or not value):
            digests[tile.tensor][tile.unit] = value
            self._beside((first, last), tile.file, tile.offset, tile.start, tile.nbytes, target)
            return
        state = hasher()
        buffer = self._combiner.whole(target)
        for done, size, place in pieces(tile.start, tile.nbytes):
            self._refuse_stopped()
            view = buffer[place : place + size]
            self._source.read_into(tile.file, view, tile.offset + done)
            state.update(view)
            for start, stop in _outside(done, done + len(view), first, last):
                origin = (source, tile.offset + start)
                target.write(view[start - done : stop - done], tile.start + start, origin)
            self._advance(len(view))
        digests[tile.tensor][tile.unit] = state.hexdigest()

    def _straight(
        self, tile: WeaveTile, digests: Digests, target: Bytes, promised: Promised
    ) -> bool:
        """Clone or copy a tile that permutes nothing, if its digests are known."""
        values = [promised(tile.tensor, p.unit) for p in tile.pieces]
        known = [v for v in values if v is not None]
        span = tile.spans[0]
        if len(known) < len(values) or (all(known) and not target.clones):
            return False
        source = self._source.file(span.file)
        first, last = target.clone(source, span.offset, tile.start, tile.nbytes)
        if last == first and any(known):
            return False  # to be copied, and held against its promise
        for piece, value in zip(tile.pieces, known, strict=True):
            digests[tile.tensor][piece.unit] = value
        self._beside((first, last), span.file, span.offset, tile.start, tile.nbytes, target)
        return True

    def _beside(  # noqa: PLR0917
        self, cloned: tuple[int, int], file: int, offset: int, at: int, nbytes: int, target: Bytes
    ) -> None:
        """Copy what of a run was not cloned; nobody needs to see it."""
        first, last = cloned
        done = last - first
        for start, stop in ((0, first), (last, nbytes)):
            if stop - start < LARGE_TILE_BYTES:  # a clone's edges meet those of its neighbours
                if start < stop:
                    view = self._combiner.place(target, at + start, stop - start)
                    self._source.read_into(file, view, offset + start)
                done += stop - start
            else:
                self._move(file, offset + start, at + start, stop - start, target)
        self._advance(done)

    def _move(self, file: int, offset: int, at: int, nbytes: int, target: Bytes) -> None:
        """Copy bytes that nobody needs to see."""
        done, buffer = 0, self._combiner.whole(target)
        source = self._source.file(file)
        while done < nbytes:
            self._refuse_stopped()
            size = min(KERNEL_COPY_BYTES, nbytes - done)
            count = target.copy(source, offset + done, at + done, size)
            if not count:
                _, count, place = next(pieces(at + done, nbytes - done))
                view = buffer[place : place + count]
                self._source.read_into(file, view, offset + done)
                target.write(view, at + done)
            done += count
            self._advance(count)

    def _refuse_stopped(self) -> None:
        if self._stop.is_set():
            raise Stopped

    def _weave(self, file: OutputFile, tile: WeaveTile, digests: Digests, target: Bytes) -> None:
        from moeconv.engine.copy.permute import (  # NumPy takes longer than to plan
            memory_of,
            permute,
        )

        first = last = 0
        if tile.straight:  # read for its digests only, where its bytes can be had without a copy
            span = tile.spans[0]
            source = self._source.file(span.file)
            first, last = target.clone(source, span.offset, tile.start, tile.nbytes)
        with self._memory.hold(memory_of(tile)) as take:
            try:
                data, units = permute(tile, self._read_span, take)
            except MoeconvError as problem:
                problem.at = problem.at or quoted(file.tensors[tile.tensor].name)
                raise
            for unit, value in units:
                digests[tile.tensor][unit] = value
            for start, stop in _outside(0, tile.nbytes, first, last):
                target.write(data[start:stop], tile.start + start)
            self._advance(tile.nbytes)

    def _read_span(self, span: Span, view: memoryview) -> memoryview:
        self._source.read_into(span.file, view, span.offset)
        return view


def whole_blocks(offset: int, at: int, nbytes: int, block: int) -> tuple[int, int]:
    """What of a run from `offset` to `at` is whole blocks on both sides: [first, last) of it."""
    if (offset - at) % block:
        return 0, 0
    first, last = -at % block, nbytes - (at + nbytes) % block
    return (first, last) if first < last else (0, 0)


def _outside(start: int, stop: int, first: int, last: int) -> list[tuple[int, int]]:
    """What of [start, stop) is not in [first, last)."""
    if last <= start or stop <= first:
        return [(start, stop)]
    parts = [(start, first), (last, stop)]
    return [(a, b) for a, b in parts if start <= a < b <= stop]


def _adjacent_copies(tiles: tuple[Tile, ...], number: int, promised: Promised) -> list[CopyTile]:
    """The copies from `number` on that are one run of bytes in source and target."""
    found: list[CopyTile] = []
    for tile in tiles[number:]:
        if not isinstance(tile, CopyTile) or promised(tile.tensor, tile.unit) is None:
            break
        if found and (tile.file, tile.offset - found[-1].offset, tile.start - found[-1].start) != (
            found[-1].file,
            found[-1].nbytes,
            found[-1].nbytes,
        ):
            break
        found.append(tile)
    return found
