"""Permuting tiles: turn, interleave or split the matrices of one expert, digests on the way."""

from __future__ import annotations

from collections.abc import Callable
from math import prod
from typing import TypeAlias

import numpy as np
from numpy.lib.stride_tricks import as_strided
from numpy.typing import NDArray

from moeconv.digest import digest
from moeconv.engine.memory import Take, paged
from moeconv.errors import UnequalShared
from moeconv.plan.values import Piece, Span, WeaveTile

Items: TypeAlias = "NDArray[np.generic]"
ReadSpan: TypeAlias = Callable[[Span, memoryview], memoryview]

# Square blocks that stay in the second-level cache: 2 to 3 GB/s, plain NumPy 0.3.
_BLOCK = 128


def memory_of(tile: WeaveTile) -> int:
    """Bytes of the blocks that `weave` takes: spans, the tile, one canonical matrix."""
    blocks = [span.nbytes for span in tile.spans]
    blocks += [] if tile.straight else [tile.nbytes]
    return sum(map(paged, [*blocks, _largest(tile)]))


def _largest(tile: WeaveTile) -> int:
    return max((prod(p.shape) * tile.itemsize for p in tile.pieces), default=0)


def weave(tile: WeaveTile, read: ReadSpan, take: Take) -> tuple[memoryview, list[tuple[int, str]]]:
    """The tile's bytes, and the digest of each of its units.

    take: memory, of which it takes `memory_of(tile)`.
    Raises UnequalShared where a layout has one place for values that differ.
    """
    dtype = f"u{tile.itemsize}"
    spans = [np.frombuffer(read(span, take(span.nbytes)), dtype=dtype) for span in tile.spans]
    spare = _Spare(take, _largest(tile))
    units: list[tuple[int, str]] = []
    if tile.straight:
        units = [
            (p.unit, _digest(_view(spans[p.span], p, p.src_offset, p.src_strides), spare))
            for p in tile.pieces
        ]
        return spans[0].view(np.uint8).data, units
    out = np.frombuffer(take(tile.nbytes), dtype=dtype)
    for piece in tile.pieces:
        source = _view(spans[piece.span], piece, piece.src_offset, piece.src_strides)
        target = _view(out, piece, piece.dst_offset, piece.dst_strides)
        if piece.repeat:
            if not np.array_equal(source, target):
                raise UnequalShared(
                    "a value that the target layout stores once differs between matrices",
                    cause=f"unit {piece.unit} of the tensor has other bytes than the first one",
                    fix="choose a layout that keeps them apart",
                )
        else:
            _move(target, source)
        # of the side that need not be turned for it
        units.append((piece.unit, _digest(source if source.flags.c_contiguous else target, spare)))
    return out.view(np.uint8).data, units


class _Spare:
    """A block for one matrix at a time, taken when the first one needs it."""

    def __init__(self, take: Take, size: int) -> None:
        self._take = take
        self._size = size
        self._block: memoryview | None = None

    def like(self, matrix: Items) -> Items:
        """Memory in canonical order for such a matrix."""
        self._block = self._block or self._take(self._size)
        data = np.frombuffer(self._block[: matrix.nbytes], dtype=matrix.dtype)
        return data.reshape(matrix.shape)


def _view(items: Items, piece: Piece, offset: int, strides: tuple[int, ...]) -> Items:
    steps = tuple(s * items.itemsize for s in strides)
    return as_strided(items[offset:], shape=piece.shape, strides=steps)


def _digest(matrix: Items, spare: _Spare) -> str:
    if not matrix.flags.c_contiguous:
        canonical = spare.like(matrix)
        _move(canonical, matrix)
        matrix = canonical
    return digest(matrix.data.cast("B"))


def _move(target: Items, source: Items) -> None:
    """target[...] = source, in blocks where the two run along different axes."""
    if target.ndim != 2 or _fastest(target) == _fastest(source):
        target[...] = source
        return
    if _fastest(source) == 0:
        target, source = target.T, source.T  # now the source has its rows in one piece
    rows, columns = target.shape
    # by way of a small block: columns a power of two apart would all meet in one set of the cache
    block = np.empty((_BLOCK, _BLOCK), dtype=source.dtype)
    for i in range(0, rows, _BLOCK):
        for j in range(0, columns, _BLOCK):
            part = block[: min(_BLOCK, rows - i), : min(_BLOCK, columns - j)]
            part[...] = source[i : i + _BLOCK, j : j + _BLOCK]
            target[i : i + _BLOCK, j : j + _BLOCK] = part


def _fastest(matrix: Items) -> int:
    return int(np.argmin(np.abs(matrix.strides)))
