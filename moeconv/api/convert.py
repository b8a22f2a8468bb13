"""The library: the writing verbs as functions. Nothing here prints or exits.

SRC is a directory, a `.safetensors` file, an output of moeconv, or `hf://org/name[@revision]`.
Every function raises a class of `moeconv.errors` for what a user can cause.
"""

from __future__ import annotations

import gc
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Final

from moeconv.checkpoint.output import SetFiles
from moeconv.checkpoint.output_files import read_root
from moeconv.checkpoint.source import Checkpoint, locate, open_checkpoint
from moeconv.core.system_errors import callers_own, system_errors
from moeconv.core.text import counted
from moeconv.detect.detect import Detection, detect
from moeconv.detect.family import family
from moeconv.detect.from_manifest import detection_from_manifest
from moeconv.detect.recorded_ranks import recorded_ranks
from moeconv.engine.commit import commit, refuse_collisions
from moeconv.engine.copy.methods import Methods
from moeconv.engine.copy.pool import Limits
from moeconv.engine.output.disk_space import DiskSpace, refuse_short, space_needed
from moeconv.engine.output.preflight import refuse_existing, refuse_overlap
from moeconv.engine.output.resume import is_restored, refuse_other_set
from moeconv.engine.output.transaction import end_run
from moeconv.errors import NotASet, UsageProblem, quoted
from moeconv.layout.recipe import Recipe
from moeconv.layout.shipped import manifest_recipes
from moeconv.manifest.model import ROOT_NAME, Manifest
from moeconv.plan.align import ALIGNS, PAGE, PAGE_ALIGNED
from moeconv.plan.convert import FUSE, UNFUSE, plan_conversion
from moeconv.plan.model import Plan
from moeconv.plan.onto_existing import plan_restore
from moeconv.plan.pack import Packing
from moeconv.plan.unequal import unequal_notes
from moeconv.quantconfig.rewrite import with_rewrites

DEFAULT_SHARD_BYTES: Final = 5_000_000_000
DEFAULT_MEMORY_BYTES: Final = 512 * 1024 * 1024
NOW: Final = "now"
LATER: Final = "later"
Progress = Callable[[int, int], None]


@dataclass(frozen=True, slots=True)
class Opened:
    """A checkpoint with what its experts are; `path` is the local SRC."""

    path: Path
    checkpoint: Checkpoint
    recipes: tuple[Recipe, ...]
    detection: Detection


@dataclass(frozen=True, slots=True)
class Result:
    """What a conversion did, or in a dry run would do."""

    source: Opened
    out: Path
    plan: Plan
    room: DiskSpace
    manifest: Manifest | None
    dry_run: bool
    methods: Methods | None = None

    @property
    def aligned_to_page(self) -> bool:
        """Whether all data sections start on a page."""
        return all(len(f.header) % PAGE == 0 for f in self.plan.files)


@dataclass(frozen=True, slots=True)
class Run:
    """How a plan is carried out. digests: `now`, or `later` for a set that gets them by `verify`.

    unchecked: restore an origin without holding its bytes against the recorded digests.
    Raises UsageProblem for a word that is none of these.
    """

    jobs: int | None
    max_memory: int
    overwrite: bool
    resume: bool
    digests: str
    dry_run: bool
    progress: Progress | None
    unchecked: bool = False

    def __post_init__(self) -> None:
        limits_of(self.jobs, self.max_memory)
        one_of("--digests", self.digests, (NOW, LATER))
        if self.resume and self.overwrite:
            raise UsageProblem(
                "`--resume` and `--overwrite` do not go together",
                cause="one goes on with what is there, the other starts anew",
                fix="choose one",
            )


def one_of(flag: str, value: str, choices: tuple[str, ...]) -> str:
    """The value, if it is one of the choices. Raises UsageProblem."""
    if value not in choices:
        raise UsageProblem(f"{quoted(value)} is no choice for `{flag}`", fix=" or ".join(choices))
    return value


@contextmanager
def uncollected() -> Iterator[None]:
    """Without the collector of cycles: plans of half a million tensors have none to find."""
    was = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was:
            gc.enable()


def default_jobs() -> int:
    """Worker threads: two a core, since half of them wait for the disk, and at most eight."""
    return min(8, 2 * (os.cpu_count() or 1))


def limits_of(jobs: int | None, max_memory: int) -> Limits:
    """What a run may use, with the default number of workers for None. Raises UsageProblem."""
    return Limits(default_jobs() if jobs is None else jobs, max_memory)


@system_errors()
@uncollected()
def open_source(
    src: str | Path,
    *,
    recipe: str | Path | None = None,
    from_layout: str | None = None,
    exclude: tuple[str, ...] = (),
) -> Opened:
    """Read headers and detect the expert stacks; problems stay in `detection.problems`.

    An output of moeconv carries its recipes and layouts: `recipe` and `from_layout` are for others.
    Raises UnknownFamily, BadRecipe, and what `open_checkpoint` raises.
    """
    path = locate(src)
    checkpoint = open_checkpoint(path, exclude=exclude)
    manifest = checkpoint.manifest
    names = tuple(f.name for f in checkpoint.files)
    if manifest is not None and manifest.root.ep_size is not None:
        recipes = manifest_recipes(manifest.root)
        detection = detection_from_manifest(manifest, checkpoint.stored, recipes)
        return Opened(path, checkpoint, recipes, detection)
    said = manifest or (checkpoint.virtual.manifest if checkpoint.virtual else None)
    if said is not None:
        recipes = manifest_recipes(said.root)
        # of a virtual set the layouts are the ranks'; its source has those of the origin
        known = {
            s.name: s if manifest else replace(s, layout=s.origin_layout) for s in said.root.stacks
        }
        detection = detect(
            checkpoint.tensors,
            checkpoint.config,
            recipes,
            files=names,
            known=known,
            ranks=recorded_ranks(said),
        )
        return Opened(path, checkpoint, recipes, detection)
    recipes, detection = family(checkpoint, recipe=recipe, from_layout=from_layout)
    return Opened(path, checkpoint, recipes, detection)


@system_errors()
def fuse(
    src: str | Path,
    out: str | Path,
    *,
    layout: str | None = None,
    from_layout: str | None = None,
    recipe: str | Path | None = None,
    exclude: tuple[str, ...] = (),
    max_shard_size: int = DEFAULT_SHARD_BYTES,
    align: str = PAGE_ALIGNED,
    digests: str = NOW,
    max_memory: int = DEFAULT_MEMORY_BYTES,
    jobs: int | None = None,
    overwrite: bool = False,
    resume: bool = False,
    dry_run: bool = False,
    progress: Progress | None = None,
) -> Result:
    """Write SRC to OUT with every expert stack in its family's fused layout, or in `layout`.

    Sizes are bytes; `progress(done, total)` is called with bytes of tensors, from workers.
    """
    source = open_source(src, recipe=recipe, from_layout=from_layout, exclude=exclude)
    plan = planned(source, FUSE, layout, packing_of(max_shard_size, align))
    run = Run(jobs, max_memory, overwrite, resume, digests, dry_run, progress)
    return carry_out(source, Path(out), plan, run)


@system_errors()
def unfuse(
    src: str | Path,
    out: str | Path,
    *,
    layout: str | None = None,
    from_layout: str | None = None,
    recipe: str | Path | None = None,
    exclude: tuple[str, ...] = (),
    max_shard_size: int = DEFAULT_SHARD_BYTES,
    align: str = PAGE_ALIGNED,
    digests: str = NOW,
    max_memory: int = DEFAULT_MEMORY_BYTES,
    jobs: int | None = None,
    overwrite: bool = False,
    resume: bool = False,
    unchecked: bool = False,
    dry_run: bool = False,
    progress: Progress | None = None,
) -> Result:
    """Write SRC to OUT per expert; an output of moeconv goes back to its original files instead.

    Those are held against the recorded digests (Damaged), unless `unchecked`.
    With `layout`, an output of moeconv is converted like any other checkpoint.
    """
    source = open_source(src, recipe=recipe, from_layout=from_layout, exclude=exclude)
    if source.checkpoint.origin is not None and layout is None:
        plan = restored(source)
    else:
        plan = planned(source, UNFUSE, layout, packing_of(max_shard_size, align))
    run = Run(jobs, max_memory, overwrite, resume, digests, dry_run, progress, unchecked)
    return carry_out(source, Path(out), plan, run)


def packing_of(max_shard_size: int, align: str) -> Packing:
    """Raises UsageProblem."""
    return Packing(max_shard_size, one_of("--align", align, ALIGNS))


@uncollected()
def planned(source: Opened, verb: str, layout: str | None, packing: Packing) -> Plan:
    """The plan of a whole output in `layout`, or in what the verb means for each family."""
    return plan_conversion(
        source.detection.checked(),
        verb=verb,
        layout=layout,
        packing=packing,
        origin_layouts=origin_layouts(source.checkpoint),
    )


def origin_layouts(checkpoint: Checkpoint) -> dict[str, str]:
    """For a set of ours, by stack: the layout of its first foreign source."""
    own = checkpoint.origin
    return {s.name: s.origin_layout for s in own.manifest.root.stacks} if own else {}


def refuse_foreign(source: Opened) -> SetFiles:
    """What is known of the origin. Raises NotASet for what is no set of moeconv."""
    own = source.checkpoint.origin
    if own is None:
        raise NotASet(
            f"{quoted(str(source.path))} was not written by moeconv",
            cause=f"it has no `{ROOT_NAME}`, so nothing says what it was made from",
            fix="`moeconv unfuse` splits the experts of any checkpoint",
        )
    return own


@uncollected()
def restored(source: Opened) -> Plan:
    """The plan of the origin, bit for bit. Raises NotASet."""
    own = refuse_foreign(source)
    tensors = tuple(t for f in own.origin.files for t in f.header.tensors)
    known = {s.name: replace(s, layout=s.origin_layout) for s in own.manifest.root.stacks}
    names = tuple(f.name for f in own.origin.files)
    recipes = manifest_recipes(own.manifest.root)
    ranks = recorded_ranks(own.manifest)
    original = detect(
        tensors, source.checkpoint.config, recipes, files=names, known=known, ranks=ranks
    )
    return plan_restore(source.detection.checked(), original.checked(), own.origin)


def _announced(plan: Plan, source: Opened, run: Run) -> Plan:
    """The plan, saying of a restore what its bytes are held against. Raises UsageProblem."""
    own = source.checkpoint.origin
    if not plan.restores or own is None:
        if run.unchecked:
            raise UsageProblem(
                "`--unchecked` is for restoring the original files of an output of moeconv",
                cause="this command writes a new output, and takes its digests",
                fix="drop `--unchecked`",
            )
        return plan
    if run.unchecked:
        note = "unchecked: the tensors' bytes are not held against the recorded digests"
    elif own.manifest.complete:
        note = "bit for bit: every byte is held against the recorded digests"
    else:
        tensors = [t for part in own.manifest.parts for t in part.tensors]
        lacking = sum(not t.digests for t in tensors)
        note = (
            f"{lacking:,} of {counted(len(tensors), 'tensor')} have no recorded digest: their "
            "bytes are written as they are, compared with nothing"
        )
    return replace(plan, notes=(*plan.notes, note))


def carry_out(source: Opened, out: Path, plan: Plan, run: Run) -> Result:
    """Refuse what must be refused, then write the plan, or in a dry run do not."""
    checkpoint = source.checkpoint
    plan = with_rewrites(_announced(plan, source, run), checkpoint, source.detection.stacks)
    refuse_overlap(source.path, out)
    if checkpoint.virtual is not None:
        refuse_overlap(checkpoint.root, out)  # where its bytes are
    # a dangling link is refused; a link to a directory stands for that directory
    place = out if out.is_symlink() and not out.exists() else Path(os.path.realpath(out))
    limits = limits_of(run.jobs, run.max_memory)
    if run.resume and plan.restores and is_restored(place, plan, checkpoint, limits):
        room = space_needed(plan, checkpoint, place)
        if not run.dry_run:
            notes = end_run(place, limits, restored=True)
            plan = replace(plan, notes=(*plan.notes, *notes))
        return Result(source, out, plan, room, None, dry_run=run.dry_run)
    replaced = refuse_existing(
        place, limits=limits, overwrite=run.overwrite, resume=run.resume, restores=plan.restores
    )
    refuse_collisions(plan, checkpoint)
    room = space_needed(plan, checkpoint, place)
    if run.dry_run:
        return Result(source, out, plan, room, None, dry_run=True)
    if not run.resume:
        refuse_short(place, room)
    if run.resume and (place / ROOT_NAME).exists():
        refuse_other_set(place, plan, checkpoint, limits)
        plan = replace(plan, notes=(*plan.notes, *end_run(place, limits)))
        return Result(source, out, plan, room, Manifest(read_root(place), ()), dry_run=False)
    meter = Meter(0 if plan.virtual else plan.tensor_bytes, run.progress)
    methods = Methods(place)
    # a virtual set is all documents; one that copies may take hours, and others need the collector
    with uncollected() if plan.virtual else nullcontext():
        manifest, notes = commit(
            plan,
            checkpoint,
            place,
            limits=limits,
            methods=methods,
            room=room,
            overwrite=run.overwrite,
            resume=run.resume,
            later=run.digests == LATER,
            unchecked=run.unchecked,
            progress=meter.advance,
            replaced=replaced,
        )
    plan = replace(plan, notes=(*plan.notes, *notes))
    if manifest is not None:
        said = unequal_notes(source.detection.stacks, manifest)
        plan = replace(plan, notes=(*plan.notes, *said))
    return Result(source, out, plan, room, manifest, dry_run=False, methods=methods)


class Meter:
    """Counts bytes for a `progress(done, total)` callback; the crew calls it one at a time."""

    def __init__(self, total: int, progress: Progress | None) -> None:
        self.done = 0
        self.total = total
        self._progress = progress

    def advance(self, nbytes: int) -> None:
        self.done += nbytes
        if self._progress is not None:
            with callers_own():
                self._progress(self.done, self.total)
