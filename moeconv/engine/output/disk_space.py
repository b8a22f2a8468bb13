"""Compare the disk space that an output needs with what is free."""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from moeconv.checkpoint.model import Checkpoint
from moeconv.core.text import human_size
from moeconv.engine.copy.methods import whole_blocks
from moeconv.engine.copy.syscalls import file_system, may_clone
from moeconv.engine.copy.worker import CLONED_TILE_BYTES
from moeconv.errors import DiskFull, quoted
from moeconv.plan.model import CopyTile, Plan

# parts, origin and index hold names and digests: a few hundred bytes a unit, plus their headers
DOCUMENT_BYTES_PER_UNIT: Final = 512


@dataclass(frozen=True, slots=True)
class DiskSpace:
    """The bytes that an output needs and that are free.

    shared: the part of `needed` that takes no space if the file system clones, as it should.
    """

    needed: int
    free: int
    shared: int = 0

    @property
    def enough(self) -> bool:
        """Whether it fits."""
        return self.needed - self.shared <= self.free


def space_needed(plan: Plan, checkpoint: Checkpoint, out: Path) -> DiskSpace:
    """Return the space that the output takes, and what is free on its file system."""
    needed = len(plan.index) + sum(s.size for s in checkpoint.sidecars)
    if not plan.virtual:
        needed += plan.file_bytes
    if not plan.restores:
        units = sum(t.units for f in plan.files for t in f.tensors)
        headers = sum(f.header.data_start for f in checkpoint.files)
        recipes = sum(len(r.toml) for r in plan.recipes)
        names = len(plan.stacks) + len(plan.files) + len(checkpoint.sidecars)
        needed += headers + len(checkpoint.index.raw if checkpoint.index else b"")
        needed += (units + names) * DOCUMENT_BYTES_PER_UNIT + 2 * recipes
    place = Path(os.path.realpath(out))
    while not place.exists():
        place = place.parent
    facts = os.statvfs(place)
    shared = sum(_clonable(plan, checkpoint, place)) if may_clone(place) else 0
    return DiskSpace(needed, facts.f_bavail * facts.f_frsize, shared)


def refuse_short(out: Path, space: DiskSpace) -> None:
    """Raise DiskFull if the output does not fit."""
    if space.enough:
        return
    sharing = f" ({human_size(space.shared)} of it can be cloned)" if space.shared else ""
    raise DiskFull(
        f"there is not enough disk space for {quoted(str(out))}",
        at=quoted(str(out)),
        cause=f"{human_size(space.needed)} is needed{sharing}, {human_size(space.free)} is free",
        fix="free some space, or choose a directory on another disk",
    )


def _clonable(plan: Plan, checkpoint: Checkpoint, place: Path) -> Iterator[int]:
    """Yield the bytes of each run that is on OUT's file system and at the same place in a block."""
    if plan.virtual or checkpoint.store.root is None:
        return
    here, block = file_system(place), max(os.statvfs(place).f_bsize, 4096)
    near = [file_system(file.path) == here for file in checkpoint.files]
    for tile in (t for file in plan.files for t in file.tiles):
        if isinstance(tile, CopyTile) and near[tile.file] and tile.nbytes >= CLONED_TILE_BYTES:
            first, last = whole_blocks(tile.offset, tile.start, tile.nbytes, block)
            yield last - first
