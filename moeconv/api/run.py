"""Carry out a plan: what to refuse first, then the engine."""

from __future__ import annotations

import os
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Final

from moeconv.api.open import Opened, gc_paused
from moeconv.checkpoint.output_files import read_root
from moeconv.core.system_errors import callers_own
from moeconv.core.text import counted
from moeconv.engine.commit import commit, refuse_collisions
from moeconv.engine.copy.methods import CopyMethods
from moeconv.engine.copy.pool import Limits
from moeconv.engine.output.disk_space import DiskSpace, refuse_short, space_needed
from moeconv.engine.output.preflight import refuse_existing, refuse_overlap
from moeconv.engine.output.resume import is_restored, refuse_other_set
from moeconv.engine.output.transaction import end_run
from moeconv.errors import UsageProblem, quoted
from moeconv.manifest.model import ROOT_NAME, Manifest
from moeconv.plan.align import PAGE
from moeconv.plan.convert import unequal_notes
from moeconv.plan.model import Plan
from moeconv.quantconfig.rewrite import with_rewrites

DEFAULT_MEMORY_BYTES: Final = 512 * 1024 * 1024
NOW: Final = "now"
LATER: Final = "later"
Progress = Callable[[int, int], None]


@dataclass(frozen=True, slots=True, kw_only=True)
class RunOptions:
    """How a plan is carried out.

    digests: `now`, or `later` to write an output without reading its data; `verify --fill` adds
    them. unchecked: restore the original files without comparing them with recorded digests.
    Raises UsageProblem for a value that is not allowed.
    """

    digests: str = NOW
    max_memory: int = DEFAULT_MEMORY_BYTES
    jobs: int | None = None
    overwrite: bool = False
    resume: bool = False
    unchecked: bool = False
    dry_run: bool = False
    progress: Progress | None = None

    def __post_init__(self) -> None:
        limits_of(self.jobs, self.max_memory)
        one_of("--digests", self.digests, (NOW, LATER))
        if self.resume and self.overwrite:
            raise UsageProblem(
                "`--resume` and `--overwrite` cannot be combined",
                cause="one continues what is there, the other starts over",
                fix="choose one",
            )


@dataclass(frozen=True, slots=True)
class Result:
    """What a conversion did, or in a dry run would do."""

    source: Opened
    out: Path
    plan: Plan
    room: DiskSpace
    manifest: Manifest | None
    dry_run: bool
    methods: CopyMethods | None = None

    @property
    def aligned_to_page(self) -> bool:
        """Whether all data sections start on a page."""
        return all(len(f.header) % PAGE == 0 for f in self.plan.files)


def carry_out(source: Opened, out: Path, plan: Plan, options: RunOptions) -> Result:
    """Check what must be refused, then write the plan; a dry run only checks.

    Raises WouldOverwrite and all that writing can raise.
    """
    checkpoint = source.checkpoint
    plan = with_rewrites(
        _with_check_note(plan, source, options), checkpoint, source.detection.stacks
    )
    refuse_overlap(source.path, out)
    if checkpoint.virtual is not None:
        refuse_overlap(checkpoint.root, out)  # the directory that its bytes are in
    # a dangling link is refused; a link to a directory stands for that directory
    place = out if out.is_symlink() and not out.exists() else Path(os.path.realpath(out))
    limits = limits_of(options.jobs, options.max_memory)
    if options.resume and plan.restores and is_restored(place, plan, checkpoint, limits):
        room = space_needed(plan, checkpoint, place)
        if not options.dry_run:
            notes = end_run(place, limits, restored=True)
            plan = replace(plan, notes=(*plan.notes, *notes))
        return Result(source, out, plan, room, None, dry_run=options.dry_run)
    replaced = refuse_existing(
        place,
        limits=limits,
        overwrite=options.overwrite,
        resume=options.resume,
        restores=plan.restores,
    )
    refuse_collisions(plan, checkpoint)
    room = space_needed(plan, checkpoint, place)
    if options.dry_run:
        return Result(source, out, plan, room, None, dry_run=True)
    if not options.resume:
        refuse_short(place, room)
    if options.resume and (place / ROOT_NAME).exists():
        refuse_other_set(place, plan, checkpoint, limits)
        plan = replace(plan, notes=(*plan.notes, *end_run(place, limits)))
        return Result(source, out, plan, room, Manifest(read_root(place), ()), dry_run=False)
    meter = Meter(0 if plan.virtual else plan.tensor_bytes, options.progress)
    methods = CopyMethods(place)
    # a virtual output is documents only; a run that copies may take hours and needs it
    with gc_paused() if plan.virtual else nullcontext():
        manifest, notes = commit(
            plan,
            checkpoint,
            place,
            limits=limits,
            methods=methods,
            room=room,
            overwrite=options.overwrite,
            resume=options.resume,
            later=options.digests == LATER,
            unchecked=options.unchecked,
            progress=meter.advance,
            replaced=replaced,
        )
    plan = replace(plan, notes=(*plan.notes, *notes))
    if manifest is not None:
        unequal = unequal_notes(source.detection.stacks, manifest)
        plan = replace(plan, notes=(*plan.notes, *unequal))
    return Result(source, out, plan, room, manifest, dry_run=False, methods=methods)


def _with_check_note(plan: Plan, source: Opened, options: RunOptions) -> Plan:
    """The plan, with a note on what a restore is compared with. Raises UsageProblem."""
    own = source.checkpoint.origin
    if not plan.restores or own is None:
        if options.unchecked:
            raise UsageProblem(
                "`--unchecked` is for restoring the original files of an output of moeconv",
                cause="this command writes a new output and computes its digests",
                fix="drop `--unchecked`",
            )
        return plan
    if options.unchecked:
        note = "unchecked: the tensors' bytes are not compared with the recorded digests"
    elif own.manifest.complete:
        note = "bit for bit: every byte is compared with the recorded digests"
    else:
        tensors = [t for part in own.manifest.parts for t in part.tensors]
        lacking = sum(not t.digests for t in tensors)
        note = (
            f"{lacking:,} of {counted(len(tensors), 'tensor')} have no recorded digest: their "
            "bytes are written without being checked"
        )
    return replace(plan, notes=(*plan.notes, note))


def one_of(flag: str, value: str, choices: tuple[str, ...]) -> str:
    """The value, if it is one of the choices. Raises UsageProblem."""
    if value not in choices:
        raise UsageProblem(f"{quoted(value)} is not a value of `{flag}`", fix=" or ".join(choices))
    return value


def default_jobs() -> int:
    """Worker threads: two per core, since half of them wait for the disk; at most eight."""
    return min(8, 2 * (os.cpu_count() or 1))


def limits_of(jobs: int | None, max_memory: int) -> Limits:
    """What the workers may use; None is the default number of workers. Raises UsageProblem."""
    return Limits(default_jobs() if jobs is None else jobs, max_memory)


class Meter:
    """Counts bytes for a `progress(done, total)` callback; called by one worker at a time."""

    def __init__(self, total: int, progress: Progress | None) -> None:
        self.done = 0
        self.total = total
        self._progress = progress

    def advance(self, nbytes: int) -> None:
        self.done += nbytes
        if self._progress is not None:
            with callers_own():
                self._progress(self.done, self.total)
