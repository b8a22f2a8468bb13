"""Carry out a plan, and say what was done."""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import dataclass, replace
from pathlib import Path

from moeconv.api.open import Opened, gc_paused
from moeconv.core.text import counted
from moeconv.engine.copy.methods import CopyMethods
from moeconv.engine.options import RunOptions
from moeconv.engine.output.disk_space import DiskSpace
from moeconv.engine.run import run
from moeconv.errors import UsageProblem
from moeconv.manifest.model import Manifest
from moeconv.plan.align import PAGE
from moeconv.plan.convert import unequal_notes
from moeconv.plan.model import Plan
from moeconv.quantconfig.rewrite_sidecars import with_rewrites


@dataclass(frozen=True, slots=True)
class Result:
    """What a conversion did, or in a dry run would do."""

    source: Opened
    out: Path
    plan: Plan
    disk_space: DiskSpace
    manifest: Manifest | None
    dry_run: bool
    methods: CopyMethods | None = None

    @property
    def aligned_to_page(self) -> bool:
        """Whether all data sections start on a page."""
        return all(len(f.header) % PAGE == 0 for f in self.plan.files)


def carry_out(source: Opened, out: Path, plan: Plan, options: RunOptions) -> Result:
    """Complete the plan with what is known of its source, and run it."""
    checkpoint, stacks = source.checkpoint, source.detection.stacks
    plan = with_rewrites(_with_check_note(plan, source, options), checkpoint, stacks)
    # a virtual output is documents only; a run that copies may take hours and needs it
    with gc_paused() if plan.virtual else nullcontext():
        done = run(plan, checkpoint, out, options, src=source.path)
    plan = done.plan
    if done.manifest is not None and done.methods is not None:
        plan = replace(plan, notes=(*plan.notes, *unequal_notes(stacks, done.manifest)))
    return Result(
        source=source,
        out=out,
        plan=plan,
        disk_space=done.space,
        manifest=done.manifest,
        dry_run=options.dry_run,
        methods=done.methods,
    )


def _with_check_note(plan: Plan, source: Opened, options: RunOptions) -> Plan:
    """The plan, with a note on what a restore is compared with. Raises UsageProblem."""
    own = source.checkpoint.origin
    if not plan.restores or own is None:
        if options.unchecked:
            raise UsageProblem(
                "`--unchecked` only applies to restoring the original files of a moeconv output",
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
