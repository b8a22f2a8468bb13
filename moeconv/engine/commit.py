"""Writing an output from its plan: data files, sidecars, parts, index, and last the manifest."""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path

from moeconv.checkpoint.origin import Origin, OriginFile, origin_bytes
from moeconv.checkpoint.sidecars import Sidecar
from moeconv.checkpoint.source import Checkpoint
from moeconv.digest import digest, fingerprint, hasher
from moeconv.engine.crew import Limits, Progress, run_tiles
from moeconv.engine.files import NEW_FILE, DiskTarget, partial_path, write_failed
from moeconv.engine.output import Room, Workplace, fsync_directory, room_for
from moeconv.engine.tiles import BUFFER_BYTES, Digests
from moeconv.errors import Damaged, NameCollision, SourceChanged, quoted
from moeconv.manifest import (
    ORIGIN_NAME,
    PARTS_DIR,
    ROOT_NAME,
    FileEntry,
    Manifest,
    Part,
    Root,
    TensorEntry,
    addresses,
    part_bytes,
    root_bytes,
)
from moeconv.names import natural_key
from moeconv.plan.values import OutputFile, Plan
from moeconv.version import __version__

# parts, origin and index hold names and digests: a few hundred bytes a tensor, plus their headers
_PAPER_BYTES_A_TENSOR = 512


def room_needed(plan: Plan, checkpoint: Checkpoint, out: Path) -> Room:
    """Bytes the output will take, and how many are free there."""
    sidecars = sum(s.size for s in checkpoint.sidecars)
    headers = sum(f.header.data_start for f in checkpoint.files)
    units = sum(t.units for f in plan.files for t in f.tensors)
    paper = 0 if plan.restores else units * _PAPER_BYTES_A_TENSOR + headers
    return room_for(out, plan.file_bytes + sidecars + len(plan.index) + paper)


def refuse_collisions(plan: Plan, checkpoint: Checkpoint) -> None:
    """Raise NameCollision where a sidecar has the name of a file of the output."""
    made = {f.name for f in plan.files} | {ROOT_NAME, PARTS_DIR, plan.index_name}
    for sidecar in checkpoint.sidecars:
        if sidecar.name.partition("/")[0] in made:
            raise NameCollision(
                f"{quoted(sidecar.name)} of the source has the name of an output file",
                at=quoted(sidecar.name),
                cause="the index does not name it, so it would be copied as it is",
                fix=f"leave it out with `--without '{sidecar.name}'`",
            )


def commit(
    plan: Plan,
    checkpoint: Checkpoint,
    out: Path,
    *,
    limits: Limits,
    overwrite: bool,
    progress: Progress,
) -> Manifest | None:
    """Carry out a plan. OUT is as it was before if anything goes wrong.

    Returns the manifest that was written, or None for a restored origin, which has none.
    Raises IoFailed, DiskFull, SourceChanged, Damaged (a set of ours whose bytes are not its own).
    """
    work = Workplace(out)
    try:
        work.prepare(overwrite=overwrite)
        return _Commit(plan, checkpoint, work, limits, progress).run()
    except BaseException as problem:
        work.take_back()
        if isinstance(problem, OSError):
            raise write_failed(out, problem) from None
        raise


class _Commit:
    def __init__(
        self,
        plan: Plan,
        checkpoint: Checkpoint,
        work: Workplace,
        limits: Limits,
        progress: Progress,
    ) -> None:
        self.plan = plan
        self.checkpoint = checkpoint
        self.work = work
        self.out = work.out
        self.limits = limits
        self.progress = progress
        self.parts: dict[str, Part] = {}
        self.expected = _expected_digests(checkpoint)
        # without an index nothing else marks a restored set as whole: names come all at the end
        self.late = plan.restores and plan.index_name is None
        self.waiting: list[tuple[Path, Path]] = []

    def run(self) -> Manifest | None:
        run_tiles(
            self.plan.files,
            self.checkpoint.files,
            lambda file: DiskTarget(file, self.out, self._finished),
            limits=self.limits,
            progress=self.progress,
        )
        sidecars = tuple(self._sidecar(s) for s in self.checkpoint.sidecars)
        manifest = None if self.plan.restores else self._papers(sidecars)
        for partial, final in self.waiting:
            self.work.rename(partial, final)
        if self.plan.index_name is not None:
            fsync_directory(self.out)
            self._write(self.plan.index_name, self.plan.index)
        fsync_directory(self.out)
        if manifest is None:
            (self.out / PARTS_DIR).rmdir()
        else:
            self._write(ROOT_NAME, root_bytes(manifest.root))
        fsync_directory(self.out)
        fsync_directory(self.out.parent)
        return manifest

    def _finished(self, file: OutputFile, partial: Path, digests: Digests) -> None:
        part = part_of(file, digests)
        self._refuse_damage(part)
        self.parts[file.name] = part
        final = self.out / file.name
        if self.late:
            self.waiting.append((partial, final))
        else:
            self.work.rename(partial, final)

    def _refuse_damage(self, part: Part) -> None:
        """The bytes of one of our sets must be those that its manifest promises."""
        if not self.expected:
            return
        for tensor in part.tensors:
            for address, value in zip(
                addresses(tensor, self.plan.stacks), tensor.digests, strict=True
            ):
                wanted = self.expected.get(address)
                if wanted is not None and wanted != value:
                    raise Damaged(
                        f"{quoted(address)} is not what the source's manifest says",
                        at=quoted(str(self.checkpoint.root)),
                        cause=f"its digest is {value}, the manifest has {wanted}",
                        fix="fetch the set again; `moeconv verify SRC` lists all the damage",
                    )

    def _papers(self, sidecars: tuple[FileEntry, ...]) -> Manifest:
        """Parts and origin; the manifest is returned, to be written last."""
        parts = tuple(self.parts[f.name] for f in self.plan.files)
        entries = tuple(
            self._write(f"{PARTS_DIR}/{part.file}.json", part_bytes(part)) for part in parts
        )
        origin = self._write(ORIGIN_NAME, _origin_raw(self.checkpoint))
        fsync_directory(self.out / PARTS_DIR)
        index_name = self.plan.index_name or ""
        root = Root(
            generator=f"moeconv {__version__}",
            recipes=self.plan.recipes,
            stacks=self.plan.stacks,
            parts=entries,
            index=FileEntry(index_name, len(self.plan.index), digest(self.plan.index)),
            origin=origin,
            sidecars=sidecars,
            tensor_count=self.plan.tensor_count,
            tensor_bytes=self.plan.tensor_bytes,
            fingerprint="0" * 32,
        )
        return with_fingerprint(Manifest(root, parts))

    def _write(self, name: str, data: bytes) -> FileEntry:
        final = self.out / name
        partial = partial_path(final)
        try:
            descriptor = os.open(partial, NEW_FILE, 0o666)
            with os.fdopen(descriptor, "wb") as stream:
                stream.write(data)
                stream.flush()
                os.fsync(descriptor)
            self.work.rename(partial, final)
        except OSError as problem:
            raise write_failed(final, problem) from None
        return FileEntry(name, len(data), digest(data))

    def _sidecar(self, sidecar: Sidecar) -> FileEntry:
        final = self.out / sidecar.name
        try:
            self.work.folder(final.parent)
            partial = partial_path(final)
            value, size = copy_file(sidecar.path, partial)
        except OSError as problem:
            raise write_failed(final, problem) from None
        entry = FileEntry(sidecar.name, size, value)
        if size != sidecar.size:
            raise SourceChanged(
                f"{quoted(sidecar.name)} changed while it was being copied",
                at=quoted(str(sidecar.path)),
                cause=f"it had {sidecar.size:,} bytes, and has {size:,} now",
                fix="wait until nothing writes to the source, then run again",
            )
        wanted = _expected_sidecar(self.checkpoint, sidecar.name)
        if wanted is not None and wanted != value:
            raise Damaged(
                f"{quoted(sidecar.name)} is not what the source's manifest says",
                at=quoted(str(sidecar.path)),
                cause=f"its digest is {value}, the manifest has {wanted}",
                fix="fetch that file of the set again",
            )
        self.work.rename(partial, final)
        if final.parent != self.out:
            fsync_directory(final.parent)
        return entry


def copy_file(source: Path, target: Path) -> tuple[str, int]:
    """Copy one file durably through a small buffer; its digest and size."""
    state = hasher()
    size = 0
    buffer = memoryview(bytearray(BUFFER_BYTES))
    with source.open("rb", buffering=0) as reader:
        descriptor = os.open(target, NEW_FILE, 0o666)
        with os.fdopen(descriptor, "wb", buffering=0) as writer:
            while count := reader.readinto(buffer):
                state.update(buffer[:count])
                writer.write(buffer[:count])
                size += count
            os.fsync(descriptor)
    return state.hexdigest(), size


def part_of(file: OutputFile, digests: Digests) -> Part:
    """The manifest part of a data file that was written with these digests."""
    return Part(
        file=file.name,
        size=file.size,
        header_size=len(file.header),
        header_digest=digest(file.header),
        tensors=tuple(
            TensorEntry(
                name=t.name,
                dtype=t.dtype,
                shape=t.shape,
                start=t.offset,
                stop=t.offset + t.nbytes,
                digests=tuple(values),
                expert=t.expert,
            )
            for t, values in zip(file.tensors, digests, strict=True)
        ),
    )


def with_fingerprint(manifest: Manifest) -> Manifest:
    """The manifest with its root's fingerprint filled in."""
    value = fingerprint(manifest.fingerprint_lines())
    return Manifest(replace(manifest.root, fingerprint=value), manifest.parts)


def _origin_raw(checkpoint: Checkpoint) -> bytes:
    if checkpoint.own is not None:
        return checkpoint.own.origin_raw
    files = tuple(
        OriginFile(f.name, f.size, f.header)
        for f in sorted(checkpoint.files, key=lambda f: natural_key(f.name))
    )
    return origin_bytes(Origin(files, checkpoint.index))


def _expected_digests(checkpoint: Checkpoint) -> dict[str, str]:
    manifest = checkpoint.manifest
    if manifest is None:
        return {}
    return {address: value for address, _, _, value in manifest.matrices()}


def _expected_sidecar(checkpoint: Checkpoint, name: str) -> str | None:
    manifest = checkpoint.manifest
    entries = manifest.root.sidecars if manifest else ()
    return next((e.digest for e in entries if e.name == name), None)
