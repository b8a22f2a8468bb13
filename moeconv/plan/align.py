"""`--align source`: files that begin where most of their bytes can be cloned from the source.

A clone needs source and target at the same place within a block, not at its start. So a file's
header is padded to that place (its *phase*), and tensors that want the same phase stand together.
Nothing but names, sizes, the flag and the source's own offsets decides, never the file system.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from itertools import chain
from typing import Final

from moeconv.plan.draft import Draft
from moeconv.plan.tiles import tiles_of
from moeconv.plan.values import CopyTile

PAGE: Final = 4096  # the smallest block of the file systems that clone
PAGE_ALIGNED: Final = "page"
SOURCE_ALIGNED: Final = "source"
ALIGNS: Final = (PAGE_ALIGNED, SOURCE_ALIGNED)
_STEP: Final = 8  # every tensor starts at a multiple of its dtype's size, at most 8
_WORTH_A_FILE: Final = 64 * 1024 * 1024


def wanted_phase(draft: Draft) -> int | None:
    """The phase at which most of a tensor's bytes could be cloned; None where none could."""
    votes: Counter[int] = Counter()
    for tile in tiles_of(draft, tensor=0, offset=0):
        if isinstance(tile, CopyTile):
            source, nbytes = tile.offset, tile.nbytes
        elif tile.straight:
            source, nbytes = tile.spans[0].offset, tile.nbytes
        else:
            continue
        phase = (source - tile.start) % PAGE
        # the two blocks at the edges are written in any case
        if phase % _STEP == 0 and nbytes >= 2 * PAGE:
            votes[phase] += nbytes - PAGE
    return _winner(votes)


def file_phase(drafts: list[Draft], phases: dict[str, int | None]) -> int:
    """The phase of a file's data section under which most of its bytes can be cloned."""
    votes: Counter[int] = Counter()
    at = 0
    for draft in drafts:
        phase = phases[draft.name]
        if phase is not None and (phase - at) % _STEP == 0:
            votes[(phase - at) % PAGE] += draft.nbytes
        at += draft.nbytes
    return _winner(votes) or 0


def _winner(votes: Counter[int]) -> int | None:
    return min(votes, key=lambda phase: (-votes[phase], phase)) if votes else None


def by_phase(drafts: list[Draft], phases: dict[str, int | None]) -> list[list[Draft]]:
    """The drafts, those together that want one phase; what is not worth a file comes last."""
    groups: dict[int | None, list[Draft]] = defaultdict(list)
    for draft in drafts:
        groups[phases[draft.name]].append(draft)
    large = [
        group
        for phase, group in groups.items()
        if phase is not None and sum(d.nbytes for d in group) >= _WORTH_A_FILE
    ]
    kept = {d.name for d in chain.from_iterable(large)}
    rest = [d for d in drafts if d.name not in kept]
    return [*large, rest] if rest or not large else large
