"""The engine's one door: check what must be refused, then write a plan's output.

Order of the checks: overlap of SRC and OUT, a finished restore, what is in OUT, name collisions,
disk space. Only then is anything written.
"""

from __future__ import annotations

import os
from dataclasses import dataclass, replace
from pathlib import Path

from moeconv.checkpoint.model import Checkpoint
from moeconv.checkpoint.output_files import read_root
from moeconv.engine.commit import commit, refuse_collisions
from moeconv.engine.copy.methods import CopyMethods
from moeconv.engine.options import RunOptions
from moeconv.engine.output.disk_space import DiskSpace, refuse_short, space_needed
from moeconv.engine.output.preflight import refuse_existing, refuse_overlap
from moeconv.engine.output.resume import is_restored, refuse_other_output
from moeconv.engine.output.transaction import end_run
from moeconv.manifest.model import ROOT_NAME, Manifest
from moeconv.plan.model import Plan
from moeconv.store.local import LocalStore


@dataclass(frozen=True, slots=True)
class Outcome:
    """What a run did, or in a dry run would do.

    plan: with the notes of the run. manifest: the one that was written; None for a restored origin
    and in a dry run. methods: how bytes were copied; None where nothing was.
    """

    plan: Plan
    space: DiskSpace
    manifest: Manifest | None = None
    methods: CopyMethods | None = None


def run(
    plan: Plan, source: Checkpoint, out: Path, options: RunOptions, *, src: Path | None
) -> Outcome:
    """Write the plan's output to OUT, or in a dry run only make the checks that need no data.

    src: the path that the source was opened by, which OUT must not overlap; None if not local.
    Raises UnsafeOutput, WouldOverwrite, CannotResume, NameCollision, DiskFull, and what `commit`
    raises.
    """
    refuse_overlap(src, out)
    if source.virtual is not None:
        refuse_overlap(source.store.root, out)  # where the bytes of a virtual output are
    # a dangling link is refused; a link to a directory stands for that directory
    place = out if out.is_symlink() and not out.exists() else Path(os.path.realpath(out))
    limits = options.limits()
    if options.resume and plan.restores and is_restored(place, plan, source, limits):
        space = space_needed(plan, source, place)
        notes = () if options.dry_run else end_run(place, limits, restored=True)
        return Outcome(_noted(plan, notes), space)
    replaced = refuse_existing(
        place,
        limits=limits,
        overwrite=options.overwrite,
        resume=options.resume,
        restores=plan.restores,
    )
    refuse_collisions(plan, source)
    space = space_needed(plan, source, place)
    if options.dry_run:
        return Outcome(plan, space)
    if not options.resume:
        refuse_short(place, space)
    if options.resume and (place / ROOT_NAME).exists():
        refuse_other_output(place, plan, source, limits)
        notes = end_run(place, limits)
        return Outcome(_noted(plan, notes), space, Manifest(read_root(LocalStore(place)), ()))
    manifest, methods, notes = commit(plan, source, place, options, space=space, replaced=replaced)
    return Outcome(_noted(plan, notes), space, manifest, methods)


def _noted(plan: Plan, notes: tuple[str, ...]) -> Plan:
    return replace(plan, notes=(*plan.notes, *notes))
