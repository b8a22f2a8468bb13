"""`--align source`: choose file starts so that most bytes can be cloned from the source.

A clone needs source and target at the same offset within a block; it need not be 0. So a file's
header is padded to that offset (its *phase*). Tensors keep the source's order: then the same sizes
are between any two of them, and one phase fits a whole source file.
The result depends on names, sizes, the flag and the source's offsets, never on the file system.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from typing import Final

from moeconv.core.dtypes import alignment
from moeconv.plan.copies import tiles_of
from moeconv.plan.model import CopyTile, Tile
from moeconv.plan.tensors import PlannedTensor

PAGE: Final = 4096  # the smallest block of the file systems that clone
PAGE_ALIGNED: Final = "page"
SOURCE_ALIGNED: Final = "source"
ALIGNS: Final = (PAGE_ALIGNED, SOURCE_ALIGNED)
_STEP: Final = 8  # every tensor starts at a multiple of its dtype's size, at most 8
_WORTH_A_FILE: Final = 64 * 1024 * 1024


@dataclass(frozen=True, slots=True, order=True)
class SourcePosition:
    """Where most of a tensor's bytes come from.

    file, offset: of the first of these bytes. phase: the offset within a page at which the tensor
    would have to start so that they can be cloned; None where none can.
    """

    file: int
    offset: int
    phase: int | None = None


def source_position(planned: PlannedTensor) -> SourcePosition:
    """The source position of a tensor: of the tiles of one phase that have the most bytes."""
    votes: Counter[int] = Counter()
    first: dict[int, SourcePosition] = {}
    anyway: SourcePosition | None = None
    for tile in tiles_of(planned, tensor=0, offset=0):
        file, offset = _origin(tile)
        anyway = min(anyway or SourcePosition(file, offset), SourcePosition(file, offset))
        if not (isinstance(tile, CopyTile) or tile.is_identity):
            continue
        phase = (offset - tile.start) % PAGE
        # the two blocks at the edges are written in any case
        if tile.nbytes >= 2 * PAGE:
            votes[phase] += tile.nbytes - PAGE
            here = SourcePosition(file, offset, phase)
            first[phase] = min(first.get(phase, here), here)
    winner = _winner(votes)
    if winner is not None:
        return first[winner]
    source = planned.source
    return anyway or (
        SourcePosition(source.file, source.offset) if source is not None else SourcePosition(0, 0)
    )


def _origin(tile: Tile) -> tuple[int, int]:
    """Source file and offset of a tile's first byte."""
    if isinstance(tile, CopyTile):
        return tile.file, tile.offset
    return tile.spans[0].file, tile.spans[0].offset


def file_phase(planned_tensors: list[PlannedTensor], positions: dict[str, SourcePosition]) -> int:
    """The phase of a file's data section under which most of its bytes can be cloned."""
    votes: Counter[int] = Counter()
    at = 0
    for planned in planned_tensors:
        phase = _data_phase(positions[planned.name], at)
        if phase is not None and phase % _STEP == 0:
            votes[phase] += planned.nbytes
        at += planned.nbytes
    return _winner(votes) or 0


def _data_phase(place: SourcePosition, at: int) -> int | None:
    """The phase of a data section in which a tensor that starts `at` into it can be cloned."""
    return None if place.phase is None else (place.phase - at) % PAGE


def _winner(votes: Counter[int]) -> int | None:
    return min(votes, key=lambda phase: (-votes[phase], phase)) if votes else None


@dataclass(slots=True)
class _Group:
    """Consecutive tensors that can share a file.

    at: where they start in the row of all; phase: that of a data section of all in which most of
    them could be cloned, None where none could; nbytes: of those that want it.
    """

    at: int
    phase: int | None
    nbytes: int
    planned_tensors: list[PlannedTensor]

    @property
    def start(self) -> int:
        """The offset within a page at which they would have to start to be cloned."""
        return ((self.phase or 0) + self.at) % PAGE

    def agrees(self, other: _Group) -> bool:
        """Whether both can share one phase without loss."""
        return None in {self.phase, other.phase} or self.phase == other.phase

    def join(self, other: _Group) -> None:
        """Append a group; the phase with more bytes is kept."""
        if self.phase == other.phase:
            self.nbytes += other.nbytes
        elif self.nbytes < other.nbytes:
            self.phase, self.nbytes = other.phase, other.nbytes
        self.planned_tensors += other.planned_tensors


def by_source_position(
    planned_tensors: list[PlannedTensor], positions: dict[str, SourcePosition]
) -> list[list[PlannedTensor]]:
    """The tensors in the source's order, cut where a change of phase pays for a new file."""
    # the sort is stable: where two have one source_position, names decide
    ordered = sorted(
        planned_tensors, key=lambda d: (positions[d.name].file, positions[d.name].offset)
    )
    runs: list[_Group] = []
    at = 0
    for planned in ordered:
        phase = _data_phase(positions[planned.name], at)
        run = _Group(at, phase, 0 if phase is None else planned.nbytes, [planned])
        if runs and runs[-1].agrees(run):
            runs[-1].join(run)
        else:
            runs.append(run)
        at += planned.nbytes
    groups = runs[:1]
    for run in runs[1:]:
        small = min(run.nbytes, groups[-1].nbytes) < _WORTH_A_FILE
        if small or groups[-1].agrees(run) or run.start % _STEP:
            groups[-1].join(run)
        else:
            groups.append(run)
    return _linked(groups) or [[]]


def _linked(groups: list[_Group]) -> list[list[PlannedTensor]]:
    """Append each group to the first row that ends at its start phase, or begin a row with it."""
    rows: list[list[PlannedTensor]] = []
    ends: list[int] = []
    for group in groups:
        if group.start in ends:
            number = ends.index(group.start)
        else:
            number = len(rows)
            rows.append([])
            ends.append(group.start)
        rows[number] += group.planned_tensors
        ends[number] = (group.start + sum(d.nbytes for d in group.planned_tensors)) % PAGE
    return rows


def misplaced(planned_tensors: list[PlannedTensor]) -> bool:
    """Whether any tensor would start at no multiple of its dtype's size."""
    at = 0
    for planned in planned_tensors:
        if at % min(alignment(planned.dtype), _STEP):
            return True
        at += planned.nbytes
    return False
