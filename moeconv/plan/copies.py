"""Plan the tiles of one output tensor: a pair of regions each, in the source and in the output.

A tile never spans two experts. Where both regions are contiguous in canonical order it is a copy;
everything else (transposed, interleaved, shared) is a permutation of one expert.
"""

from __future__ import annotations

from collections.abc import Iterator

from moeconv.core.dtypes import BITS
from moeconv.errors import SubByteAxis, quoted
from moeconv.layout.axes import Geometry
from moeconv.plan.model import CopyTile, PermuteTile, Span, Strided, StridedCopy, Tile
from moeconv.plan.tensors import PlannedTensor


def tiles_of(planned: PlannedTensor, *, tensor: int, offset: int) -> Iterator[Tile]:
    """The tiles of one output tensor that starts at byte `offset` of its file.

    tensor: its index in the file. Raises SubByteAxis.
    """
    source, target = planned.source, planned.geometry
    if not planned.nbytes:
        return
    if source is not None:
        yield CopyTile(offset, source.nbytes, tensor, 0, source.file, source.offset)
    elif target is not None and _is_copy(planned, target):
        yield from _copies(planned, target, tensor, offset)
    elif target is not None:
        yield from _permutations(planned, target, tensor, offset)


def _is_copy(planned: PlannedTensor, target: Geometry) -> bool:
    """Whether each matrix is one run of whole bytes on both sides, in canonical order."""
    bits = BITS[planned.dtype]
    geometries = (target, *(r.geometry for r in planned.regions))
    return (
        (target.expert_stride != 0 or len(planned.keys) == 1)
        and (target.pair_stride != 0 or len(planned.regions) == 1)
        and all(g.contiguous for g in geometries)
        and all(s * bits % 8 == 0 for g in geometries for s in (g.expert_stride, g.pair_stride))
    )


def _copies(
    planned: PlannedTensor, target: Geometry, tensor: int, offset: int
) -> Iterator[CopyTile]:
    bits = BITS[planned.dtype]
    run = planned.nbytes // len(planned.keys)
    nbytes = run // len(planned.regions)
    pairs = [
        (r.of, r.offset * bits // 8, place * target.pair_stride * bits // 8)
        for place, r in enumerate(planned.regions)
    ]
    unit = 0
    for key in planned.keys:
        for region_of, inner, start in pairs:
            file, base, _ = region_of(key)
            yield CopyTile(offset + start, nbytes, tensor, unit, file, base + inner)
            unit += 1
        offset += run


def _permutations(
    planned: PlannedTensor, target: Geometry, tensor: int, offset: int
) -> Iterator[PermuteTile]:
    """A tile for each expert, or a single one where the output has one value for all of them."""
    bits, name = BITS[planned.dtype], planned.name
    apart = target.expert_stride or len(planned.keys) == 1
    groups = [(key,) for key in planned.keys] if apart else [planned.keys]
    nbytes = planned.nbytes // len(groups)
    unit = 0
    for number, keys in enumerate(groups):
        spans: list[Span] = []
        copies: list[StridedCopy] = []
        taken: set[int] = set()
        for key in keys:
            for place, regions in enumerate(planned.regions):
                region = regions.of(key)
                span = Span(region.file, region.base, region.nbytes(bits))
                if span not in spans:
                    spans.append(span)
                here, shape = _in_items(regions.geometry, regions.offset, bits, name)
                there, _ = _in_items(target, target.pair_stride * place, bits, name)
                repeat = there.offset in taken
                copies.append(StridedCopy(unit, spans.index(span), here, there, shape, repeat))
                taken.add(there.offset)
                unit += 1
        itemsize, start = max(bits // 8, 1), offset + number * nbytes
        yield PermuteTile(start, nbytes, tensor, itemsize, tuple(spans), tuple(copies))


def _in_items(
    geometry: Geometry, offset: int, bits: int, name: str
) -> tuple[Strided, tuple[int, ...]]:
    """The matrix at element `offset`, and its shape, both in items of whole bytes.

    Elements of less than a byte are counted in bytes, which requires that the fastest axis fills
    whole bytes. Raises SubByteAxis.
    """
    if bits >= 8:
        return Strided(offset, tuple(s for _, s in geometry.matrix)), geometry.canonical_shape
    *outer, (last, step) = geometry.matrix or ((1, 1),)
    counts = (offset * bits, last * bits, *(s * bits for _, s in outer))
    if step != 1 or any(n % 8 for n in counts):
        raise SubByteAxis(
            f"{quoted(name)} cannot be rearranged: its values do not fill whole bytes",
            at=quoted(name),
            cause=f"a value has {bits} bits, and the fastest axis has {last} of them "
            f"in steps of {step}",
            fix="choose a layout that keeps the K axis last",
        )
    strides = (*(s * bits // 8 for _, s in outer), 1)
    shape = (*(n for n, _ in outer), last * bits // 8)
    return Strided(offset * bits // 8, strides), shape
