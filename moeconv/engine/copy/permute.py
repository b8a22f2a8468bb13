"""Permuting tiles: transpose, interleave or split one expert's matrices, with their digests."""

from __future__ import annotations

from collections.abc import Callable
from math import prod
from typing import TypeAlias

import numpy as np
from numpy.lib.stride_tricks import as_strided
from numpy.typing import NDArray

from moeconv.core.digest import digest
from moeconv.engine.copy.buffers import Allocate, paged
from moeconv.errors import UnequalShared
from moeconv.plan.model import PermuteTile, Span, Strided

Items: TypeAlias = "NDArray[np.generic]"
ReadSpan: TypeAlias = Callable[[Span, memoryview], memoryview]

# Items of a square block, two of which stay in the second-level cache: bf16 is transposed at 2 to
# 4 GB/s, by plain NumPy at 0.3.
_BLOCK = 256
# Items between the rows of a block: rows a power of two apart would meet in one set of the cache.
_GAP = 32
# Columns at most so many items apart (gpt-oss alternates two matrices) are read with those between:
# to pick them from what is not in the cache yet is slow.
_FARTHEST = 2
_READ_SHAPE = (_BLOCK, _FARTHEST * _BLOCK + _GAP)
_TRANSPOSED_SHAPE = (_BLOCK, _BLOCK + _GAP)


def memory_of(tile: PermuteTile) -> int:
    """Bytes that `permute` takes: spans, the tile, one canonical matrix, two blocks."""
    blocks = [span.nbytes for span in tile.spans]
    blocks += [] if tile.is_identity else [tile.nbytes]
    return sum(map(paged, [*blocks, _largest_matrix(tile), _block_bytes(tile)]))


def _block_bytes(tile: PermuteTile) -> int:
    return (prod(_READ_SHAPE) + prod(_TRANSPOSED_SHAPE)) * tile.itemsize


def _largest_matrix(tile: PermuteTile) -> int:
    return max((prod(p.shape) * tile.itemsize for p in tile.pieces), default=0)


def permute(
    tile: PermuteTile, read: ReadSpan, take: Allocate
) -> tuple[memoryview, list[tuple[int, str]]]:
    """The tile's bytes, and the digest of each of its units.

    take: memory, of which it takes `memory_of(tile)`.
    Raises UnequalShared where a layout has one place for values that differ.
    """
    dtype = f"u{tile.itemsize}"
    spans = [np.frombuffer(read(span, take(span.nbytes)), dtype=dtype) for span in tile.spans]
    scratch = _Scratch(take, tile)
    units: list[tuple[int, str]] = []
    if tile.is_identity:
        units = [
            (p.unit, _digest(view(spans[p.span], p.source, p.shape), scratch)) for p in tile.pieces
        ]
        return spans[0].view(np.uint8).data, units
    out = np.frombuffer(take(tile.nbytes), dtype=dtype)
    for piece in tile.pieces:
        source = view(spans[piece.span], piece.source, piece.shape)
        target = view(out, piece.target, piece.shape)
        if piece.repeat:
            if not np.array_equal(source, target):
                raise UnequalShared(
                    "a value that the target layout stores once differs between matrices",
                    cause=f"matrix {piece.unit} of the tensor differs from an earlier one",
                    fix="choose a layout that stores them separately",
                )
        else:
            _move(target, source, scratch)
        # of the side that need not be transposed for it
        units.append(
            (piece.unit, _digest(source if source.flags.c_contiguous else target, scratch))
        )
    return out.view(np.uint8).data, units


class _Scratch:
    """Buffers to work in, taken when the first matrix needs it and kept for the next."""

    def __init__(self, take: Allocate, tile: PermuteTile) -> None:
        self._take = take
        self._tile = tile
        self._canonical: memoryview | None = None
        self._blocks: tuple[Items, Items] | None = None

    def like(self, matrix: Items) -> Items:
        """A buffer in canonical order for such a matrix."""
        self._canonical = self._canonical or self._take(_largest_matrix(self._tile))
        data = np.frombuffer(self._canonical[: matrix.nbytes], dtype=matrix.dtype)
        return data.reshape(matrix.shape)

    def blocks(self) -> tuple[Items, Items]:
        """A block as it is read, `_READ_SHAPE`, and one transposed, `_TRANSPOSED_SHAPE`."""
        if self._blocks is None:
            items = np.frombuffer(self._take(_block_bytes(self._tile)), f"u{self._tile.itemsize}")
            read, transposed = np.split(items, [prod(_READ_SHAPE)])
            self._blocks = read.reshape(_READ_SHAPE), transposed.reshape(_TRANSPOSED_SHAPE)
        return self._blocks


def view(items: Items, place: Strided, shape: tuple[int, ...]) -> Items:
    """The matrix of canonical shape that is at `place` in a span or tile."""
    steps = tuple(s * items.itemsize for s in place.strides)
    return as_strided(items[place.offset :], shape=shape, strides=steps)


def _digest(matrix: Items, scratch: _Scratch) -> str:
    if not matrix.flags.c_contiguous:
        canonical = scratch.like(matrix)
        _move(canonical, matrix, scratch)
        matrix = canonical
    return digest(matrix.data.cast("B"))


def _move(target: Items, source: Items, scratch: _Scratch) -> None:
    """target[...] = source, in blocks where the two run along different axes."""
    if target.ndim != 2 or _fastest(target) == _fastest(source):
        target[...] = source
        return
    if _fastest(source) == 0:
        target, source = target.T, source.T  # now the source runs along its rows
    step = source.strides[1] // source.itemsize
    if not 1 <= step <= _FARTHEST:
        target[...] = source
        return
    rows, columns = source.shape
    wide = as_strided(
        source, (rows, (columns - 1) * step + 1), (source.strides[0], source.itemsize)
    )
    read, transposed = scratch.blocks()
    for j in range(0, columns, _BLOCK):
        for i in range(0, rows, _BLOCK):
            part = wide[i : i + _BLOCK, j * step : (j + _BLOCK - 1) * step + 1]
            height, width = part.shape
            read[:height, :width] = part
            picked = read[:height, :width:step].T
            across = transposed[: picked.shape[0], :height]
            across[...] = picked
            target.T[j : j + _BLOCK, i : i + _BLOCK] = across


def _fastest(matrix: Items) -> int:
    return int(np.argmin(np.abs(matrix.strides)))
