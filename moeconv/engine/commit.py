"""Write a plan's output: data files, sidecars, parts, index, and last the manifest."""

from __future__ import annotations

import os
import threading
from dataclasses import dataclass, field, replace
from pathlib import Path

from moeconv.checkpoint.model import Checkpoint
from moeconv.core.digest import digest, hasher
from moeconv.core.signals import defer_signals
from moeconv.engine.copy.buffers import BUFFER_BYTES
from moeconv.engine.copy.disk_sink import DiskSink
from moeconv.engine.copy.methods import CopyMethods
from moeconv.engine.copy.pool import run_tiles
from moeconv.engine.copy.sink import Digests
from moeconv.engine.manifest_writer import (
    document,
    document_names,
    grouped,
    origin_of,
    part_of,
    read_back,
    source_entry,
    virtual_parts,
)
from moeconv.engine.options import LATER, Meter, RunOptions
from moeconv.engine.output.atomic_file import (
    fsync_directory,
    new_file,
    partial_path,
    write_new,
    writing,
)
from moeconv.engine.output.disk_space import DiskSpace, refuse_short
from moeconv.engine.output.journal import clear_aborted_start, plan_digest, resumable
from moeconv.engine.output.ownership import OutputInventory
from moeconv.engine.output.resume import finished_before, identity
from moeconv.engine.output.transaction import OutputTransaction
from moeconv.engine.recorded_digests import DigestPolicy, Recorded, recorded
from moeconv.errors import MoeconvError, NameCollision, SourceChanged, quoted
from moeconv.manifest.model import (
    MAX_DOCUMENT_BYTES,
    ORIGIN_NAME,
    PARTS_DIR,
    ROOT_NAME,
    FileEntry,
    Manifest,
    Part,
    Root,
)
from moeconv.manifest.reader import parse_root
from moeconv.manifest.writer import root_bytes
from moeconv.plan.model import OutputFile, Plan, Rewrite
from moeconv.store.base import File
from moeconv.store.documents import opened, read_document, unreadable
from moeconv.store.file_io import append, read_available
from moeconv.version import __version__


def refuse_collisions(plan: Plan, checkpoint: Checkpoint) -> None:
    """Raise NameCollision if a sidecar has the name of a file that the output will have."""
    made = {f.name for f in plan.files} | {ROOT_NAME, PARTS_DIR, plan.index_name}
    for sidecar in checkpoint.sidecars:
        if sidecar.name.partition("/")[0] in made:
            raise NameCollision(
                f"{quoted(sidecar.name)} of the source has the name of an output file",
                at=quoted(sidecar.name),
                cause="the index does not name it, so it would be copied unchanged",
                fix=f"leave it out with `--exclude '{sidecar.name}'`",
            )


def commit(
    plan: Plan,
    checkpoint: Checkpoint,
    out: Path,
    options: RunOptions,
    *,
    space: DiskSpace,
    replaced: OutputInventory | None = None,
) -> tuple[Manifest | None, CopyMethods, tuple[str, ...]]:
    """Write the plan's output; if anything fails, OUT is as it was before.

    With `options.resume` it continues an earlier run of the same plan, and what is finished is kept
    if this one fails. space: counts on clones; checked again without them if the file systems turn
    out not to clone. replaced: what is in an OUT that is to be overwritten.
    Returns the manifest that was written, None for a restored origin, which has none; how bytes
    were copied; and notes. Raises IoFailed, DiskFull, SourceChanged, Damaged (an output of moeconv
    whose bytes differ from its manifest).
    """
    limits, methods = options.limits(), CopyMethods(out)
    work = OutputTransaction(out, limits, replaced, keeps=options.resume)
    mark = plan_digest(plan, identity(checkpoint))
    kept: dict[str, Digests] = {}
    journal = None
    try:
        if options.resume and out.exists() and not clear_aborted_start(out) and any(out.iterdir()):
            work.lock()
            journal = resumable(out, mark)
            work.refuse_appeared(journal)
            kept = finished_before(out, plan, journal, limits)
        try:
            if journal is not None:
                work.reopen(journal, kept)
            else:
                work.prepare(mark, _names(plan, checkpoint), overwrite=options.overwrite)
            resumed = journal is not None
            run = _Commit(plan, checkpoint, work, options, methods, space, kept, resumed)
            manifest = run.run()
            work.done(restored=plan.restores)
        except BaseException as problem:
            _roll_back(work, problem)
            raise
    finally:
        work.close()
    return manifest, methods, work.drop_old()


def _names(plan: Plan, checkpoint: Checkpoint) -> tuple[str, ...]:
    """Every file that the run will make, for the journal."""
    data = [] if plan.virtual else [f.name for f in plan.files]
    index = [plan.index_name] if plan.index_name else []
    return (*data, *document_names(plan), *index, *(s.name for s in checkpoint.sidecars))


def _roll_back(work: OutputTransaction, problem: BaseException) -> None:
    with defer_signals():  # a second Ctrl-C must not interrupt the cleanup
        left = work.roll_back()
        if left and isinstance(problem, MoeconvError):
            problem.cause = f"{problem.cause}; {left}" if problem.cause else left
        elif left or isinstance(problem, KeyboardInterrupt):
            problem.add_note(left or "what was written has been removed")


@dataclass(slots=True)
class _Commit:
    plan: Plan
    checkpoint: Checkpoint
    work: OutputTransaction
    options: RunOptions
    methods: CopyMethods
    space: DiskSpace
    kept: dict[str, Digests]  # of data files that an earlier run finished
    resumed: bool
    out: Path = field(init=False)
    recorded: Recorded = field(init=False)
    policy: DigestPolicy = field(init=False)
    parts: dict[str, Part] = field(default_factory=dict)
    virtual: tuple[Part, ...] = ()
    waiting: list[tuple[Path, Path]] = field(default_factory=list)  # to be renamed at the end
    noting: threading.Lock = field(default_factory=threading.Lock)

    def __post_init__(self) -> None:
        self.out = self.work.out
        self.recorded = recorded(self.checkpoint)
        self.policy = DigestPolicy(
            self.plan, self.recorded, later=self.later, unchecked=self.options.unchecked
        )

    @property
    def later(self) -> bool:
        """Whether digests are left for `verify --fill`."""
        return self.options.digests == LATER

    def run(self) -> Manifest | None:
        self.recorded.refuse_edited(self.checkpoint.sidecars)  # before hours of copying
        if self.plan.virtual:
            known = self.recorded.matrices
            self.virtual = virtual_parts(self.plan.files, self.plan.stacks, known)
        else:
            self.methods.probe(f.path for f in self.checkpoint.files)
            # a resumed run has freed space since; each file asks for what it still needs
            if not self.resumed and not self.methods.share_blocks:
                refuse_short(self.out, replace(self.space, shared=0))
            meter = Meter(self.plan.tensor_bytes, self.options.progress)
            for file in self.plan.files:
                if file.name in self.kept:
                    self.parts[file.name] = self._checked(file, self.kept[file.name])
                    meter.advance(file.size - len(file.header))
            run_tiles(
                tuple(f for f in self.plan.files if f.name not in self.kept),
                self.checkpoint.files,
                lambda file: DiskSink(file, self.out, self.methods, self._finished),
                limits=self.work.limits,
                progress=meter.advance,
                policy=self.policy.of_file,
            )
        sidecars = tuple(self._sidecar(s) for s in self.checkpoint.sidecars)
        manifest = None if self.plan.restores else self._documents(sidecars)
        for partial, final in self.waiting:
            self._rename(partial, final)
        self._fsync_out()
        self.work.refuse_changed()
        if self.plan.index_name is not None:
            self._write(self.plan.index_name, self.plan.index)
            self._fsync_out()
        if manifest is not None:
            self._write(ROOT_NAME, root_bytes(manifest.root))
            self._fsync_out()
        return manifest

    def _fsync_out(self) -> None:
        with writing(self.out):
            fsync_directory(self.out)

    def _finished(self, file: OutputFile, partial: Path, digests: Digests) -> None:
        self.parts[file.name] = self._checked(file, digests)
        final = self.out / file.name
        with writing(final), self.noting:
            self.work.folder(final.parent)  # original files may be in folders
        if self.plan.restores and self.plan.index_name is None:
            # without an index only the names show that a restored output is complete
            self.waiting.append((partial, final))
        else:
            self._rename(partial, final)
            self._fsync_out()
            if self.work.journal is not None:
                with self.noting:
                    self.work.journal.finished(file, digests)

    def _rename(self, partial: Path, final: Path) -> None:
        """Give a file its name, durably if it is in a folder; `_fsync_out` is for the others."""
        self.work.rename(partial, final)
        if final.parent != self.out:
            with writing(final.parent):
                fsync_directory(final.parent)

    def _checked(self, file: OutputFile, digests: Digests) -> Part:
        """Return a file's part. Raises Damaged if its digests differ from the recorded ones."""
        part = part_of(file, digests)
        if self.policy.compares:
            self.recorded.check_file(part, digests, self.plan.stacks)
        return part

    def _documents(self, sidecars: tuple[FileEntry, ...]) -> Manifest:
        """Write parts and origin; return the manifest, which is written last."""
        written = [self.parts[f.name] for f in self.plan.files if f.name in self.parts]
        groups = grouped([*written, *self.virtual], self.plan.ep_size)
        entries = tuple(
            self._write(name, document(name, parts, self.plan.ep_size))
            for name, parts in groups.items()
        )
        origin = self._write(ORIGIN_NAME, origin_of(self.checkpoint, self.plan))
        with writing(self.out):
            fsync_directory(self.out / PARTS_DIR)
        plan, index = self.plan, None
        if plan.index_name is not None:
            index = FileEntry(plan.index_name, len(plan.index), digest(plan.index))
        root = Root(
            generator=f"moeconv {__version__}",
            recipes=plan.recipes,
            stacks=plan.stacks,
            parts=entries,
            index=index,
            origin=origin,
            sidecars=sidecars,
            tensor_count=plan.tensor_count,
            tensor_bytes=plan.tensor_bytes,
            fingerprint=None,
            ep_size=plan.ep_size,
            source=source_entry(self.checkpoint) if plan.virtual else None,
            unread=self.later,
        )
        manifest = read_back(root, groups)
        # what the strict reader would refuse must not be written in the first place
        parse_root(root_bytes(manifest.root))
        return manifest

    def _write(self, name: str, data: bytes) -> FileEntry:
        final = self.out / name
        partial = partial_path(self.out, name)
        with writing(final):
            write_new(partial, data)
        self.work.rename(partial, final)
        return FileEntry(name, len(data), digest(data))

    def _sidecar(self, sidecar: File) -> FileEntry:
        final = self.out / sidecar.name
        rewrite = next((r for r in self.plan.rewrites if r.name == sidecar.name), None)
        if rewrite is not None:
            return self._rewritten(sidecar, rewrite)
        partial = partial_path(self.out, "sidecar")
        with writing(final):
            self.work.folder(final.parent)
        value = copy_sidecar(sidecar, partial, final)
        self.recorded.check_sidecar(sidecar, value)
        self._rename(partial, final)
        return FileEntry(sidecar.name, sidecar.size, value)

    def _rewritten(self, sidecar: File, rewrite: Rewrite) -> FileEntry:
        now = read_document(sidecar, MAX_DOCUMENT_BYTES)
        if now != rewrite.before:
            raise _changed(sidecar, f"and its content has changed ({len(now):,} bytes now)")
        self.recorded.check_sidecar(sidecar, digest(now))
        final = self.out / sidecar.name
        with writing(final):
            self.work.folder(final.parent)
        return self._write(sidecar.name, rewrite.after)


def copy_sidecar(sidecar: File, partial: Path, final: Path) -> str:
    """Copy one file through a small buffer and fsync it; return its digest.

    Raises SourceChanged where it is not the file that was planned with, IoFailed, DiskFull.
    """
    state = hasher()
    buffer = memoryview(bytearray(BUFFER_BYTES))
    with opened(sidecar.path, name=sidecar.name) as (reader, _):
        with writing(final), new_file(partial) as writer:
            done = 0
            while count := _read(reader, buffer, done, sidecar):
                state.update(buffer[:count])
                append(writer, buffer[:count])
                done += count
        facts = os.fstat(reader)
    if (facts.st_size, facts.st_mtime_ns, done) != (sidecar.size, sidecar.mtime_ns, sidecar.size):
        raise _changed(sidecar, f"and has {facts.st_size:,} now, or its content was changed")
    return state.hexdigest()


def _changed(sidecar: File, now: str) -> SourceChanged:
    return SourceChanged(
        f"{quoted(sidecar.name)} changed while SRC was being converted",
        at=quoted(str(sidecar.path)),
        cause=f"it had {sidecar.size:,} bytes when the plan was made, {now}",
    )


def _read(reader: int, buffer: memoryview, offset: int, sidecar: File) -> int:
    try:
        return read_available(reader, buffer, offset)
    except OSError as problem:
        raise unreadable(sidecar.path, problem, name=sidecar.name) from None
