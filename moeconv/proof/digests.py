"""Re-reading a checkpoint unit by unit: level `digest`, and the facts for diff and fingerprint."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from moeconv.checkpoint.reading import file_digest
from moeconv.checkpoint.source import Checkpoint
from moeconv.digest import fingerprint, fingerprint_line
from moeconv.engine.crew import Limits, Progress
from moeconv.engine.papers import part_of
from moeconv.engine.recorded import recorded
from moeconv.engine.rehash import digests_of
from moeconv.errors import Damaged, IoFailed, Malformed, MoeconvError, quoted
from moeconv.layout.detect import Detection
from moeconv.manifest import (
    FileEntry,
    Manifest,
    Part,
    StackEntry,
    addresses,
    canonical_shape,
)
from moeconv.plan.existing import PlacedHeader, plan_onto, plan_onto_itself


@dataclass(frozen=True, slots=True)
class Matrix:
    """One logical matrix or other tensor: what `diff` compares and the fingerprint sums up."""

    dtype: str
    shape: tuple[int, ...]
    digest: str


def placed_headers(checkpoint: Checkpoint) -> tuple[PlacedHeader, ...]:
    """A checkpoint's data files as places to plan onto."""
    parts = checkpoint.manifest.parts if checkpoint.manifest else ()
    ranks = {p.file: p.rank for p in parts}
    return tuple(
        PlacedHeader(f.name, f.size, f.header, ranks.get(f.name)) for f in checkpoint.files
    )


def rehash(
    checkpoint: Checkpoint, detection: Detection, *, limits: Limits, progress: Progress
) -> tuple[Part, ...]:
    """The digests of every unit, freshly read, as the parts that a manifest would have."""
    headers, manifest = placed_headers(checkpoint), checkpoint.manifest
    if manifest is not None and manifest.root.ep_size is not None:
        files = plan_onto_itself(manifest, headers)
    else:
        files = plan_onto(detection, detection, headers)
    found = digests_of(files, checkpoint.files, limits=limits, progress=progress)
    return tuple(part_of(f, found[f.name]) for f in files)


def stack_entries(checkpoint: Checkpoint, detection: Detection) -> tuple[StackEntry, ...]:
    """The stacks as `rehash`'s parts number them."""
    manifest = checkpoint.manifest
    if manifest is not None and manifest.root.ep_size is not None:
        return manifest.root.stacks
    return entries_of(detection)


def entries_of(detection: Detection) -> tuple[StackEntry, ...]:
    """The stacks of a detection as a plan from it numbers them."""
    return tuple(
        StackEntry(
            s.name,
            s.recipe.name,
            s.layout.name,
            s.layout.name,
            s.sizes.experts,
            s.sizes.width,
            s.sizes.hidden,
        )
        for s in detection.stacks
    )


@dataclass(frozen=True, slots=True)
class Contents:
    """What a checkpoint holds, by address.

    damaged: addresses whose bytes are not those that the manifest records, or not the same in all
    replicas; `matrices` has what was read.
    """

    matrices: dict[str, Matrix]
    damaged: tuple[str, ...] = ()


def believed(checkpoint: Checkpoint) -> dict[str, Matrix] | None:
    """Every logical matrix and other tensor as the manifest records it, if it has all digests."""
    known = checkpoint.origin.manifest if checkpoint.origin else None
    if known is None or not known.complete:
        return None
    return {a: Matrix(d, s, v) for a, d, s, v in known.matrices()}


def contents(
    checkpoint: Checkpoint, detection: Detection, *, limits: Limits, progress: Progress
) -> Contents:
    """Every logical matrix and other tensor, read and hashed, and held against the manifest."""
    parts = rehash(checkpoint, detection, limits=limits, progress=progress)
    record = recorded(checkpoint)
    found: dict[str, Matrix] = {}
    damaged: dict[str, None] = {}
    for address, matrix in _flat(parts, stack_entries(checkpoint, detection)):
        first = found.setdefault(address, matrix)
        wanted = record.matrices.get(address, None if record.complete else first.digest)
        if matrix.digest != wanted:
            damaged[address] = None
            found[address] = matrix  # of replicas the one that is wrong
    return Contents(found, tuple(damaged))


def _flat(parts: tuple[Part, ...], stacks: tuple[StackEntry, ...]) -> Iterator[tuple[str, Matrix]]:
    for part in parts:
        for tensor in part.tensors:
            shape = canonical_shape(tensor)
            for address, value in zip(addresses(tensor, stacks), tensor.digests, strict=True):
                yield address, Matrix(tensor.dtype, shape, value)


def fingerprint_of(found: dict[str, Matrix]) -> str:
    """The fingerprint of a checkpoint's matrices."""
    return fingerprint(fingerprint_line(a, m.dtype, m.shape, m.digest) for a, m in found.items())


def compare_digests(
    manifest: Manifest, fresh: tuple[Part, ...], stacks: tuple[StackEntry, ...]
) -> list[MoeconvError]:
    """Every unit whose bytes are not those that the manifest promises."""
    promised = {address: value for address, _, _, value in manifest.matrices()}
    said = {(part.file, t.name): t.expert for part in manifest.parts for t in part.tensors}
    virtual = manifest.root.source is not None  # its parts are of other files than were read
    problems: list[MoeconvError] = []
    for part in fresh:
        for tensor in part.tensors:
            if not virtual and said.get((part.file, tensor.name)) != tensor.expert:
                problems.append(
                    Damaged(
                        f"{quoted(tensor.name)} is not what its part says",
                        at=f"{quoted(part.file)}, tensor {quoted(tensor.name)}",
                        cause=f"by its recipe it is {tensor.expert}",
                        fix="convert the checkpoint again; a manifest is never edited by hand",
                    )
                )
            for address, value in zip(addresses(tensor, stacks), tensor.digests, strict=True):
                if promised.get(address) == value:
                    continue
                problems.append(
                    Damaged(
                        f"{quoted(address)} is damaged",
                        at=f"{quoted(part.file)}, tensor {quoted(tensor.name)}",
                        cause=f"its digest is {value}, the manifest has {promised.get(address)}",
                        fix="fetch that file of the set again, or convert again",
                    )
                )
    return problems


def compare_file(root: Path, entry: FileEntry) -> list[MoeconvError]:
    """Whether a sidecar still has its digest."""
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
            fix="fetch that file of the set again",
        )
    ]
