"""`--align source`: files that begin where most of their bytes can be cloned from the source.

A clone needs source and target at the same place within a block, not at its start. So a file's
header is padded to that place (its *phase*). Tensors keep the source's order, because then the odd
sizes between two of them stand between them here, too, and one phase fits a whole source file.
Nothing but names, sizes, the flag and the source's own offsets decides, never the file system.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from typing import Final

from moeconv.checkpoint.dtypes import alignment
from moeconv.plan.copies import tiles_of
from moeconv.plan.model import CopyTile, Tile
from moeconv.plan.tensors import Draft

PAGE: Final = 4096  # the smallest block of the file systems that clone
PAGE_ALIGNED: Final = "page"
SOURCE_ALIGNED: Final = "source"
ALIGNS: Final = (PAGE_ALIGNED, SOURCE_ALIGNED)
_STEP: Final = 8  # every tensor starts at a multiple of its dtype's size, at most 8
_WORTH_A_FILE: Final = 64 * 1024 * 1024


@dataclass(frozen=True, slots=True, order=True)
class Home:
    """Where most of a tensor's bytes come from.

    file, offset: of the first of them, in the source; phase: of a page, at which the tensor would
    have to start so that they can be cloned; None where none can.
    """

    file: int
    offset: int
    phase: int | None = None


def home(draft: Draft) -> Home:
    """The home of a tensor: that of the tiles, alike in their phase, that have most bytes."""
    votes: Counter[int] = Counter()
    first: dict[int, Home] = {}
    anyway: Home | None = None
    for tile in tiles_of(draft, tensor=0, offset=0):
        file, offset = _origin(tile)
        anyway = min(anyway or Home(file, offset), Home(file, offset))
        if not (isinstance(tile, CopyTile) or tile.straight):
            continue
        phase = (offset - tile.start) % PAGE
        # the two blocks at the edges are written in any case
        if tile.nbytes >= 2 * PAGE:
            votes[phase] += tile.nbytes - PAGE
            here = Home(file, offset, phase)
            first[phase] = min(first.get(phase, here), here)
    winner = _winner(votes)
    if winner is not None:
        return first[winner]
    source = draft.source
    return anyway or (Home(source.file, source.offset) if source is not None else Home(0, 0))


def _origin(tile: Tile) -> tuple[int, int]:
    """Source file and offset of a tile's first byte."""
    if isinstance(tile, CopyTile):
        return tile.file, tile.offset
    return tile.spans[0].file, tile.spans[0].offset


def file_phase(drafts: list[Draft], homes: dict[str, Home]) -> int:
    """The phase of a file's data section under which most of its bytes can be cloned."""
    votes: Counter[int] = Counter()
    at = 0
    for draft in drafts:
        phase = _data_phase(homes[draft.name], at)
        if phase is not None and phase % _STEP == 0:
            votes[phase] += draft.nbytes
        at += draft.nbytes
    return _winner(votes) or 0


def _data_phase(place: Home, at: int) -> int | None:
    """The phase of a data section in which a tensor that starts `at` into it can be cloned."""
    return None if place.phase is None else (place.phase - at) % PAGE


def _winner(votes: Counter[int]) -> int | None:
    return min(votes, key=lambda phase: (-votes[phase], phase)) if votes else None


@dataclass(slots=True)
class _Group:
    """Tensors that follow one another and can share a file.

    at: where they start in the row of all; phase: that of a data section of all in which most of
    them could be cloned, None where none could; nbytes: of those that want it.
    """

    at: int
    phase: int | None
    nbytes: int
    drafts: list[Draft]

    @property
    def start(self) -> int:
        """Where in a page they would have to start; where none can be cloned, anywhere."""
        return ((self.phase or 0) + self.at) % PAGE

    def agrees(self, other: _Group) -> bool:
        """Whether one phase is as good for both as two."""
        return None in {self.phase, other.phase} or self.phase == other.phase

    def join(self, other: _Group) -> None:
        """Take those that follow; the phase is that of more bytes."""
        if self.phase == other.phase:
            self.nbytes += other.nbytes
        elif self.nbytes < other.nbytes:
            self.phase, self.nbytes = other.phase, other.nbytes
        self.drafts += other.drafts


def by_home(drafts: list[Draft], homes: dict[str, Home]) -> list[list[Draft]]:
    """The drafts in the order of the source, cut where another phase begins to pay."""
    # the sort is stable: where two have one home, names decide
    ordered = sorted(drafts, key=lambda d: (homes[d.name].file, homes[d.name].offset))
    runs: list[_Group] = []
    at = 0
    for draft in ordered:
        phase = _data_phase(homes[draft.name], at)
        run = _Group(at, phase, 0 if phase is None else draft.nbytes, [draft])
        if runs and runs[-1].agrees(run):
            runs[-1].join(run)
        else:
            runs.append(run)
        at += draft.nbytes
    groups = runs[:1]
    for run in runs[1:]:
        small = min(run.nbytes, groups[-1].nbytes) < _WORTH_A_FILE
        if small or groups[-1].agrees(run) or run.start % _STEP:
            groups[-1].join(run)
        else:
            groups.append(run)
    return _linked(groups) or [[]]


def _linked(groups: list[_Group]) -> list[list[Draft]]:
    """The groups, each behind the first that ends where it wants to start, if there is one."""
    rows: list[list[Draft]] = []
    ends: list[int] = []
    for group in groups:
        if group.start in ends:
            number = ends.index(group.start)
        else:
            number = len(rows)
            rows.append([])
            ends.append(group.start)
        rows[number] += group.drafts
        ends[number] = (group.start + sum(d.nbytes for d in group.drafts)) % PAGE
    return rows


def misplaced(drafts: list[Draft]) -> bool:
    """Whether a tensor would not start at a multiple of its dtype's size."""
    at = 0
    for draft in drafts:
        if at % min(alignment(draft.dtype), _STEP):
            return True
        at += draft.nbytes
    return False
