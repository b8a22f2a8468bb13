"""Permuting tiles: turn, interleave or split the matrices of one expert, digests on the way."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeAlias

import numpy as np
from numpy.lib.stride_tricks import as_strided
from numpy.typing import NDArray

from moeconv.digest import digest
from moeconv.errors import UnequalShared
from moeconv.plan.values import Piece, Span, WeaveTile

Items: TypeAlias = "NDArray[np.generic]"
ReadSpan: TypeAlias = Callable[[Span], memoryview]

# Square blocks whose rows of source and target both stay in the first-level cache: 5x plain NumPy.
_BLOCK = 64
_PAGE_BYTES = 4096


def memory_of(tile: WeaveTile) -> int:
    """Bytes that `weave` holds at once: spans, the tile, one canonical matrix."""
    return 2 * tile.nbytes + sum(span.nbytes for span in tile.spans)


def weave(tile: WeaveTile, read: ReadSpan) -> tuple[memoryview, list[tuple[int, str]]]:
    """The tile's bytes, and the digest of each of its units.

    Raises UnequalShared where a layout has one place for values that differ.
    """
    spans = [np.frombuffer(read(span), dtype=f"u{tile.itemsize}") for span in tile.spans]
    units: list[tuple[int, str]] = []
    if tile.straight:
        units = [
            (p.unit, _digest(_view(spans[p.span], p, p.src_offset, p.src_strides)))
            for p in tile.pieces
        ]
        return spans[0].view(np.uint8).data, units
    out = paged(tile.nbytes).view(f"u{tile.itemsize}")
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
        units.append((piece.unit, _digest(target)))
    return out.view(np.uint8).data, units


def paged(nbytes: int) -> NDArray[np.uint8]:
    """Memory that begins with a page, not zeroed: it can be written past the page cache."""
    memory = np.empty(nbytes + _PAGE_BYTES, dtype=np.uint8)
    shift = -memory.ctypes.data % _PAGE_BYTES
    return memory[shift : shift + nbytes]


def _view(items: Items, piece: Piece, offset: int, strides: tuple[int, ...]) -> Items:
    steps = tuple(s * items.itemsize for s in strides)
    return as_strided(items[offset:], shape=piece.shape, strides=steps)


def _digest(matrix: Items) -> str:
    if not matrix.flags.c_contiguous:
        canonical = np.empty(matrix.shape, dtype=matrix.dtype)
        _move(canonical, matrix)
        matrix = canonical
    return digest(matrix.data.cast("B"))


def _move(target: Items, source: Items) -> None:
    """target[...] = source, in blocks where the two run along different axes."""
    if target.ndim != 2 or _fastest(target) == _fastest(source):
        target[...] = source
        return
    rows, columns = target.shape
    for i in range(0, rows, _BLOCK):
        for j in range(0, columns, _BLOCK):
            target[i : i + _BLOCK, j : j + _BLOCK] = source[i : i + _BLOCK, j : j + _BLOCK]


def _fastest(matrix: Items) -> int:
    return int(np.argmin(np.abs(matrix.strides)))
