"""Plan the tiles of one output tensor: which runs of source bytes fill each run of its bytes.

A tile never spans two experts. Where both sides hold a matrix as one run in canonical order it is
a copy; everything else (transposed, interleaved, shared) is a permutation of one expert.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from moeconv.checkpoint.dtypes import BITS
from moeconv.detect.stack import StoredComponent
from moeconv.errors import SubByteAxis, quoted
from moeconv.layout.axes import EXPERT, Geometry
from moeconv.plan.model import CopyTile, PermuteTile, Span, StridedCopy, Tile
from moeconv.plan.tensors import ExpertMatrices, PlannedTensor


def tiles_of(planned: PlannedTensor, *, tensor: int, offset: int) -> Iterator[Tile]:
    """The tiles of one output tensor that starts at byte `offset` of its file."""
    if planned.matrices is None:
        source = planned.source
        if source is not None and source.nbytes:
            yield CopyTile(offset, source.nbytes, tensor, 0, source.file, source.offset)
        return
    if planned.nbytes == 0:
        return
    yield from _Permuter(planned, planned.matrices, tensor, offset).tiles()


@dataclass(frozen=True, slots=True)
class _Strided:
    """One matrix within a run: offset, shape and strides, in items of `itemsize` bytes."""

    offset: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]


class _Permuter:
    """Plans the tiles of one output tensor of a stack."""

    def __init__(
        self, planned: PlannedTensor, matrices: ExpertMatrices, tensor: int, offset: int
    ) -> None:
        self.matrices = matrices
        self.tensor = tensor
        self.offset = offset
        self.bits = BITS[planned.dtype]
        self.name = planned.name
        self.keys = matrices.keys
        self.runs = len(self.keys) if EXPERT in matrices.axes.letters else 1
        self.run_bytes = planned.nbytes // self.runs
        self.members = matrices.members

    def tiles(self) -> Iterator[Tile]:
        if self._is_copy():
            yield from self._copies()
            return
        if self.runs == len(self.keys):
            for number, key in enumerate(self.keys):
                yield self._permuted(number, (key,))
        else:
            yield self._permuted(0, self.keys)

    def _is_copy(self) -> bool:
        target = self.matrices.geometry
        return (
            self.runs == len(self.keys)
            and (target.pair_stride != 0 or len(self.members) == 1)
            and target.contiguous
            and all(m.geometry.contiguous for m in self.members)
            and all(
                stride * self.bits % 8 == 0
                for g in (target, *(m.geometry for m in self.members))
                for stride in (g.expert_stride, g.pair_stride)
            )
        )

    def _copies(self) -> Iterator[Tile]:
        target = self.matrices.geometry
        nbytes = self.run_bytes // len(self.members)
        pairs = [
            (
                member.place,
                g * target.pair_stride * self.bits // 8,
                member.geometry.expert_stride * self.bits // 8,
                member.geometry.pair_stride * projection_place(member, name) * self.bits // 8,
            )
            for g, (member, name) in enumerate(
                zip(self.members, self.matrices.expert.projections, strict=True)
            )
        ]
        base, unit = self.offset, 0
        for key in self.keys:
            for place, start, step, inner in pairs:
                source, position = place(key)
                at = source.offset + step * position + inner
                yield CopyTile(base + start, nbytes, self.tensor, unit, source.file, at)
                unit += 1
            base += self.run_bytes

    def _permuted(self, number: int, keys: tuple[int, ...]) -> PermuteTile:
        spans: list[Span] = []
        pieces: list[StridedCopy] = []
        taken: set[int] = set()
        for position, key in enumerate(keys):
            for g, (member, projection) in enumerate(
                zip(self.members, self.matrices.expert.projections, strict=True)
            ):
                span = self._span(member, key)
                if span not in spans:
                    spans.append(span)
                inner = member.geometry.pair_stride * projection_place(member, projection)
                source = self._in_items(member.geometry, inner)
                target = self._in_items(
                    self.matrices.geometry, self.matrices.geometry.pair_stride * g
                )
                pieces.append(
                    StridedCopy(
                        unit=(number + position) * len(self.members) + g,
                        span=spans.index(span),
                        src_offset=source.offset,
                        src_strides=source.strides,
                        dst_offset=target.offset,
                        dst_strides=target.strides,
                        shape=source.shape,
                        repeat=target.offset in taken,
                    )
                )
                taken.add(target.offset)
        return PermuteTile(
            self.offset + number * self.run_bytes,
            self.run_bytes,
            self.tensor,
            max(self.bits // 8, 1),
            tuple(spans),
            tuple(pieces),
        )

    def _span(self, member: StoredComponent, key: int) -> Span:
        """The run of the source that holds this expert; E is outermost, so it is one."""
        tensor, position = member.place(key)
        if EXPERT not in member.axes.letters:
            return Span(tensor.file, tensor.offset, tensor.nbytes)
        run = member.geometry.expert_stride * self.bits // 8
        return Span(tensor.file, tensor.offset + position * run, run)

    def _in_items(self, geometry: Geometry, offset: int) -> _Strided:
        shape = geometry.canonical_shape
        strides = tuple(stride for _, stride in geometry.matrix)
        if self.bits >= 8:
            return _Strided(offset, shape, strides)
        return self._sub_byte(geometry, offset)

    def _sub_byte(self, geometry: Geometry, offset: int) -> _Strided:
        """Count bytes instead of elements, which requires that the fastest axis fills whole bytes.

        Raises SubByteAxis.
        """
        *outer, (last, step) = geometry.matrix or ((1, 1),)
        counts = (offset * self.bits, last * self.bits, *(s * self.bits for _, s in outer))
        if step != 1 or any(n % 8 for n in counts):
            raise SubByteAxis(
                f"{quoted(self.name)} cannot be rearranged: its values do not fill whole bytes",
                at=quoted(self.name),
                cause=f"a value has {self.bits} bits, and the fastest axis has {last} of them "
                f"in steps of {step}",
                fix="choose a layout that keeps the K axis last",
            )
        shape = (*(n for n, _ in outer), last * self.bits // 8)
        strides = (*(s * self.bits // 8 for _, s in outer), 1)
        return _Strided(offset * self.bits // 8, shape, strides)


def projection_place(member: StoredComponent, projection: str) -> int:
    """The position of a projection along G in the tensors of a member."""
    return member.line.projections.index(projection)
