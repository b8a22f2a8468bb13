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


def matrices(
    checkpoint: Checkpoint, detection: Detection, *, limits: Limits, progress: Progress
) -> dict[str, Matrix]:
    """Every logical matrix and other tensor by address: from the manifest, or read and hashed."""
    known = checkpoint.manifest or (checkpoint.virtual.manifest if checkpoint.virtual else None)
    if known is not None and known.complete:
        return {a: Matrix(d, s, v) for a, d, s, v in known.matrices()}
    parts = rehash(checkpoint, detection, limits=limits, progress=progress)
    return dict(_flat(parts, stack_entries(checkpoint, detection)))


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
