"""Read and hash a checkpoint matrix by matrix: level `digest`, and input of diff, fingerprint."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from moeconv.checkpoint.model import Checkpoint
from moeconv.core.digest import fingerprint, fingerprint_line
from moeconv.core.text import counted
from moeconv.detect.detect import Detection
from moeconv.engine.copy.pool import Limits, Progress, digests_of
from moeconv.engine.manifest_writer import entry_of
from moeconv.engine.recorded_digests import recorded
from moeconv.errors import Damaged, IoFailed, Malformed, MoeconvError, quoted
from moeconv.manifest.model import (
    ExpertEntry,
    FileEntry,
    Manifest,
    StackEntry,
    TensorEntry,
    addresses,
    canonical_shape,
)
from moeconv.plan.convert import entries_as_stored
from moeconv.plan.onto_existing import PlacedHeader, plan_onto, plan_rereading
from moeconv.store.documents import file_digest


@dataclass(frozen=True, slots=True)
class Matrix:
    """One logical matrix or other tensor: what `diff` compares and the fingerprint sums up."""

    dtype: str
    shape: tuple[int, ...]
    digest: str


def placed_headers(checkpoint: Checkpoint) -> tuple[PlacedHeader, ...]:
    """A checkpoint's data files, as the planner takes existing files."""
    parts = checkpoint.manifest.parts if checkpoint.manifest else ()
    ranks = {p.file: p.rank for p in parts}
    return tuple(
        PlacedHeader(f.name, f.size, f.header, ranks.get(f.name)) for f in checkpoint.files
    )


def rehash(
    checkpoint: Checkpoint, detection: Detection, *, limits: Limits, progress: Progress
) -> Iterator[tuple[str, TensorEntry]]:
    """Read and hash every matrix: (file, tensor entry as in a manifest).

    Everything is read before the first item is returned.
    """
    headers, manifest = placed_headers(checkpoint), checkpoint.manifest
    if manifest is not None and manifest.root.ep_size is not None:
        files = plan_rereading(manifest, headers)
    else:
        files = plan_onto(detection, detection, headers)
    found = digests_of(files, checkpoint.files, limits=limits, progress=progress)
    return (
        (file.name, entry_of(tensor, tensor.offset, tuple(values) if all(values) else ()))
        for file in files
        for tensor, values in zip(file.tensors, found[file.name], strict=True)
    )


def stack_entries(checkpoint: Checkpoint, detection: Detection) -> tuple[StackEntry, ...]:
    """The stacks as `rehash`'s tensors number them."""
    manifest = checkpoint.manifest
    if manifest is not None and manifest.root.ep_size is not None:
        return manifest.root.stacks
    return entries_as_stored(detection.stacks)


@dataclass(frozen=True, slots=True)
class Contents:
    """What a checkpoint holds, by address.

    damaged: addresses whose bytes are not those that the manifest records, or not the same in all
    replicas; `matrices` has what was read.
    """

    matrices: dict[str, Matrix]
    damaged: tuple[str, ...] = ()


def recorded_contents(checkpoint: Checkpoint) -> dict[str, Matrix] | None:
    """Every logical matrix and other tensor as the manifest records it, if it has all digests."""
    known = checkpoint.origin.manifest if checkpoint.origin else None
    if known is None or not known.complete:
        return None
    return {a: Matrix(d, s, v) for a, d, s, v in known.matrices()}


def contents(
    checkpoint: Checkpoint, detection: Detection, *, limits: Limits, progress: Progress
) -> Contents:
    """Read and hash every logical matrix and other tensor, and compare with the manifest."""
    fresh = rehash(checkpoint, detection, limits=limits, progress=progress)
    record = recorded(checkpoint)
    found: dict[str, Matrix] = {}
    damaged: dict[str, None] = {}
    stacks = stack_entries(checkpoint, detection)
    for _, tensor in fresh:
        shape = canonical_shape(tensor)
        for address, value in zip(addresses(tensor, stacks), tensor.digests, strict=True):
            matrix = Matrix(tensor.dtype, shape, value)
            first = found.setdefault(address, matrix)
            wanted = record.matrices.get(address, None if record.complete else first.digest)
            if value != wanted:
                damaged[address] = None
                found[address] = matrix  # of replicas the one that is wrong
    return Contents(found, tuple(damaged))


def fingerprint_of(found: dict[str, Matrix]) -> str:
    """The fingerprint of a checkpoint's matrices."""
    return fingerprint(fingerprint_line(a, m.dtype, m.shape, m.digest) for a, m in found.items())


def compare_digests(
    manifest: Manifest,
    fresh: Iterable[tuple[str, TensorEntry]],
    stacks: tuple[StackEntry, ...],
) -> Iterator[MoeconvError]:
    """Yield every tensor and matrix that is not what the manifest records.

    fresh: the result of `rehash`.
    """
    known = {address: value for address, _, _, value in manifest.matrices()}
    experts = {
        (part.file, t.name): t.expert for part in manifest.parts for t in part.tensors if t.expert
    }
    virtual = manifest.root.source is not None  # its parts do not list the files that were read
    for file, tensor in fresh:
        place = f"{quoted(file)}, tensor {quoted(tensor.name)}"
        if not virtual and experts.get((file, tensor.name)) != tensor.expert:
            yield misdescribed(tensor.expert, file, tensor.name)
        for address, value in zip(addresses(tensor, stacks), tensor.digests, strict=True):
            if known.get(address) != value:
                yield Damaged(
                    f"{quoted(address)} is damaged",
                    at=place,
                    cause=f"its digest is {value}, the manifest has {known.get(address)}",
                )


def misdescribed(wanted: ExpertEntry | None, file: str, tensor: str) -> Damaged:
    """The error for a tensor that its part does not describe as its recipe does."""
    what = "not an expert's"
    if wanted is not None:
        what = (
            f"{quoted(wanted.component)} of {' and '.join(wanted.projections)}, with axes "
            f"{quoted(wanted.axes)}, of {counted(len(wanted.experts), 'expert')}"
        )
    return Damaged(
        f"{quoted(tensor)} does not match its part",
        at=f"{quoted(file)}, tensor {quoted(tensor)}",
        cause=f"by its recipe it is {what}",
        fix="convert the checkpoint again; manifests must not be edited by hand",
    )


def compare_file(root: Path, entry: FileEntry) -> list[MoeconvError]:
    """Compare a sidecar with its digest."""
    try:
        value = file_digest(root / entry.name, name=entry.name)
    except (IoFailed, Malformed) as problem:
        return [problem]
    if value == entry.digest:
        return []
    return [
        Damaged(
            f"{quoted(entry.name)} is damaged",
            at=quoted(entry.name),
            cause=f"its digest is {value}, the manifest has {entry.digest}",
            fix="fetch that file again, or convert again",
        )
    ]
