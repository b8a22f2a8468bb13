"""Which part of a tensor a DTensor's rank holds, as ranges of bytes. Arithmetic only.

A selection is, for each dimension, the spans (start, stop) of indices in the order in which the
local tensor has them.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise, product
from math import prod
from typing import Final, Protocol, TypeAlias, cast

Spans: TypeAlias = tuple[tuple[int, int], ...]
Selection: TypeAlias = tuple[Spans, ...]

MIN_PIECE_BYTES: Final = 256 * 1024  # a read of less takes as long as one of this
FEW_PIECES: Final = 16
BLOCK_BYTES: Final = 16 * 1024 * 1024


class ShardPlacement(Protocol):
    """What the placements of all versions of torch that shard have."""

    dim: int


def whole(sizes: tuple[int, ...]) -> Selection:
    """All of a tensor."""
    return tuple(((0, n),) if n else () for n in sizes)


def counts(selection: Selection) -> tuple[int, ...]:
    """The shape of what is selected."""
    return tuple(sum(b - a for a, b in spans) for spans in selection)


def sub_span(spans: Spans, start: int, stop: int) -> Spans:
    """The indices at positions `start` to before `stop` in the order of the spans."""
    out, at = [], 0
    for a, b in spans:
        first, last = a + max(start - at, 0), a + min(stop - at, b - a)
        if first < last:
            out.append((first, last))
        at += b - a
    return _adjacent(out)


def _adjacent(spans: Sequence[tuple[int, int]]) -> Spans:
    out: list[tuple[int, int]] = []
    for a, b in spans:
        if out and out[-1][1] == a:
            out[-1] = (out[-1][0], b)
        else:
            out.append((a, b))
    return tuple(out)


def chunk(spans: Spans, parts: int, number: int) -> Spans:
    """As `torch.chunk`: equal parts rounded up, the last ones shorter or empty."""
    total = sum(b - a for a, b in spans)
    size = -(-total // parts)
    return sub_span(spans, min(number * size, total), min((number + 1) * size, total))


def strided_chunk(spans: Spans, factor: int, parts: int, number: int) -> Spans:
    """As torch's `_StridedShard`: of each of `factor` chunks the chunk `number` of `parts`."""
    pieces = (chunk(chunk(spans, factor, n), parts, number) for n in range(factor))
    return _adjacent([span for piece in pieces for span in piece])


def local_selection(
    sizes: tuple[int, ...],
    mesh: tuple[int, ...],
    coordinate: Sequence[int],
    placements: Sequence[object],
) -> Selection | str:
    """What the rank at a mesh coordinate holds of a global shape; or why that is unknown."""
    out = list(whole(sizes))
    for parts, number, placement in zip(mesh, coordinate, placements, strict=True):
        kind = type(placement).__name__
        if kind == "Replicate":
            continue
        if kind not in ("Shard", "_StridedShard"):
            return f"a DTensor placed as {placement!r} cannot be filled from files"
        dim = cast("ShardPlacement", placement).dim
        factor = getattr(placement, "split_factor", 1)
        out[dim] = strided_chunk(out[dim], factor, parts, number)
    return tuple(out)


def _split(sizes: tuple[int, ...], selection: Selection) -> int:
    """The innermost dimension that is not taken whole, or 0."""
    dim = len(sizes) - 1
    while dim > 0 and selection[dim] == ((0, sizes[dim]),):
        dim -= 1
    return max(dim, 0)


def pieces(sizes: tuple[int, ...], item: int, selection: Selection) -> Iterator[tuple[int, int]]:
    """The (start, stop) bytes of a selection of a row-major tensor, in its own order."""
    if not sizes:
        yield 0, item
        return
    dim = _split(sizes, selection)
    strides = [prod(sizes[d + 1 :]) * item for d in range(dim + 1)]
    rows = [[i for a, b in spans for i in range(a, b)] for spans in selection[:dim]]
    for index in product(*rows):
        base = sum(i * stride for i, stride in zip(index, strides, strict=False))
        yield from ((base + a * strides[dim], base + b * strides[dim]) for a, b in selection[dim])


def covering(sizes: tuple[int, ...], item: int, selection: Selection) -> Selection:
    """What to read for a selection: exact along dimensions 0 and 1, whole rows beyond.

    Along dimension 1, too, all is read where its pieces are many and too small.
    """
    if len(sizes) < 2 or not all(selection):
        return selection
    rows, inner = selection[:2]
    size = prod(sizes[2:]) * item
    number = sum(b - a for a, b in rows) * len(inner)
    if number > FEW_PIECES and min(b - a for a, b in inner) * size < MIN_PIECE_BYTES:
        inner = ((0, sizes[1]),)
    return (rows, inner, *whole(sizes[2:]))


@dataclass(frozen=True, slots=True)
class Block:
    """Rows of a destination, or columns (along dimension 1) of one, and what to read for them.

    columns: None for all. shape: of the bytes read, which are more than the rows where `read`
    covers more.
    """

    rows: tuple[int, int]
    columns: tuple[int, int] | None
    pieces: tuple[tuple[int, int], ...]
    shape: tuple[int, ...]


def blocks(
    sizes: tuple[int, ...],
    item: int,
    wanted: Selection,
    read: Selection,
    *,
    rows: tuple[int, int],
    limit: int | None,
) -> Iterator[Block]:
    """Cut rows of a destination into blocks of at most `limit` bytes, or of a column of a row."""
    if not sizes:
        yield Block((0, 1), None, ((0, item),), (1,))
        return
    shape = counts(read)
    row_bytes = prod(shape[1:]) * item
    step = max(limit // max(row_bytes, 1), 1) if limit else max(rows[1] - rows[0], 1)
    across: list[tuple[int, int] | None] = [None]
    if limit and row_bytes > limit and len(sizes) > 1 and wanted[1] == read[1]:
        width = max(limit // (prod(shape[2:]) * item), 1)
        across = list(pairwise([*range(0, shape[1], width), shape[1]]))
    for start, stop in pairwise([*range(rows[0], rows[1], step), rows[1]]):
        spans = sub_span(read[0], start, stop)
        for columns in across:
            inner = read[1:] if columns is None else (sub_span(read[1], *columns), *read[2:])
            taken = (spans, *inner)
            yield Block((start, stop), columns, tuple(pieces(sizes, item, taken)), counts(taken))


def copies(wanted: Selection, read: Selection) -> Iterator[tuple[Spans, Spans]]:
    """What to copy out of a block into its place: spans of both along dimensions 1 and on."""
    options = []
    for want, got in zip(wanted[1:], read[1:], strict=True):
        if want == got:
            options.append([((0, -1), (0, -1))])  # all of it, however many there are in the block
        else:  # `got` is whole
            ends = list(accumulate((b - a for a, b in want), initial=0))
            options.append(list(zip(pairwise(ends), want, strict=True)))
    for chosen in product(*options):
        yield tuple(to for to, _ in chosen), tuple(source for _, source in chosen)
