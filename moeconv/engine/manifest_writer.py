"""The documents of an output: parts from plans and digests, the root, the origin."""

from __future__ import annotations

import os
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import replace
from typing import Final, TypeAlias

from moeconv.checkpoint.model import Checkpoint
from moeconv.checkpoint.origin import origin_bytes
from moeconv.core.digest import digest, fingerprint
from moeconv.core.schema import MAX_TEXT_BYTES
from moeconv.core.strict_json import encodable
from moeconv.engine.copy.sink import Digests
from moeconv.errors import InternalError, NotVirtual, quoted
from moeconv.manifest.model import (
    ORIGIN_NAME,
    Manifest,
    Part,
    Root,
    Run,
    SourceEntry,
    SourceFile,
    StackEntry,
    TensorEntry,
    addresses,
    append_run,
    part_name,
    part_names,
)
from moeconv.manifest.part_reader import parse_parts
from moeconv.manifest.writer import part_bytes, rank_part_bytes
from moeconv.plan.model import CopyTile, OutputFile, OutputTensor, PermuteTile, Plan

Grouped: TypeAlias = dict[str, tuple[Part, ...]]  # by the name of the document
_READ_AT_ONCE: Final = 4096  # tensors: as values of JSON they take kilobytes each


def document_names(plan: Plan) -> list[str]:
    """Return the names of the documents that an output has besides root and index."""
    if plan.restores:
        return []
    if plan.ep_size is not None:
        return [*part_names(plan.ep_size), ORIGIN_NAME]
    return [*(part_name(f.name) for f in plan.files), ORIGIN_NAME]


def part_of(file: OutputFile, digests: Digests) -> Part:
    """Return the manifest part of a data file; an empty digest in `digests` is left out."""
    return Part(
        file=file.name,
        size=file.size,
        header_size=len(file.header),
        header_digest=digest(file.header),
        tensors=tuple(
            entry_of(t, t.offset, tuple(values) if all(values) else ())
            for t, values in zip(file.tensors, digests, strict=True)
        ),
        rank=file.rank,
    )


def entry_of(
    t: OutputTensor, start: int = 0, digests: tuple[str, ...] = (), runs: tuple[Run, ...] = ()
) -> TensorEntry:
    """Return the manifest entry of an output tensor."""
    return TensorEntry(
        name=t.name,
        dtype=t.dtype,
        shape=t.shape,
        start=start,
        stop=start + t.nbytes,
        digests=digests,
        expert=t.expert,
        runs=runs,
    )


def virtual_parts(
    files: tuple[OutputFile, ...], stacks: tuple[StackEntry, ...], known: dict[str, str]
) -> tuple[Part, ...]:
    """Return the parts of a virtual output: for each rank, and for all, runs of the source's files.

    files: planned so that no tile changes the order of the source's bytes.
    known: digests by address, as far as the source's manifest has them.
    """
    tensors: dict[int | None, list[TensorEntry]] = defaultdict(list)
    for file in files:
        runs: list[list[Run]] = [[] for _ in file.tensors]
        for tile in file.tiles:
            if isinstance(tile, PermuteTile) and not tile.is_identity:
                raise InternalError(f"a run of {file.tensors[tile.tensor].name} would be reordered")
            source = tile if isinstance(tile, CopyTile) else tile.spans[0]
            append_run(runs[tile.tensor], Run(source.file, source.offset, tile.nbytes))
        for tensor, its_runs in zip(file.tensors, runs, strict=True):
            bare = entry_of(tensor, runs=tuple(its_runs))
            found = [known.get(address) for address in addresses(bare, stacks)]
            have = tuple(value for value in found if value is not None)
            entry = replace(bare, digests=have if len(have) == len(found) else ())
            tensors[file.rank].append(entry)
    return tuple(Part("", 0, 0, "", tuple(entries), rank) for rank, entries in tensors.items())


def grouped(parts: Sequence[Part], ep_size: int | None) -> Grouped:
    """Return the parts that each document of an output contains, in the order of the root."""
    if ep_size is None:
        return {part_name(p.file): (p,) for p in parts}
    names = part_names(ep_size).items()
    return {name: tuple(p for p in parts if p.rank == rank) for name, rank in names}


def document(name: str, parts: tuple[Part, ...], ep_size: int | None) -> bytes:
    """Return the bytes of one of the documents of `grouped`."""
    if ep_size is None:
        return part_bytes(parts[0])
    return rank_part_bytes(part_names(ep_size)[name], parts)


def read_back(root: Root, groups: Grouped) -> Manifest:
    """Return the manifest of a root and its parts, with its fingerprint filled in.

    Serialises the parts and reads them back with the strict reader, some thousand tensors at a
    time. Raises InternalError if that fails or gives something else.
    """
    for name, parts in groups.items():
        for start in range(0, max((len(p.tensors) for p in parts), default=0), _READ_AT_ONCE):
            few = tuple(replace(p, tensors=p.tensors[start : start + _READ_AT_ONCE]) for p in parts)
            if parse_parts(document(name, few, root.ep_size), root, where=name) != few:
                raise InternalError(f"{quoted(name)} would not be read as intended")
    manifest = Manifest(root, tuple(p for parts in groups.values() for p in parts))
    value = fingerprint(manifest.fingerprint_lines()) if manifest.complete else None
    return replace(manifest, root=replace(root, fingerprint=value))


def source_entry(checkpoint: Checkpoint) -> SourceEntry:
    """Return where a virtual output finds its bytes, and what shows that they are still the same.

    Raises NotVirtual if the manifest cannot express it.
    """
    directory = os.path.realpath(checkpoint.store.address)
    if not encodable(directory) or len(directory.encode()) > MAX_TEXT_BYTES:
        raise _inexpressible(directory, "its path is not UTF-8, or longer than 4,096 bytes")
    partial = next((f.name for f in checkpoint.files if not f.whole), None)
    if partial is not None:
        raise _inexpressible(
            directory,
            f"only some tensors of {quoted(partial)} are taken",
            fix="drop `--virtual`, or `--only-index`",
        )
    early = next((f.name for f in checkpoint.files if f.mtime_ns < 0), None)
    if early is not None:
        raise _inexpressible(directory, f"{quoted(early)} was last changed before 1970")
    files = tuple(
        SourceFile(f.name, f.size, f.mtime_ns, len(f.header.raw), digest(f.header.raw))
        for f in checkpoint.files
    )
    return SourceEntry(directory, files)


def _inexpressible(
    directory: str, cause: str, *, fix: str = "move or touch the source, or drop `--virtual`"
) -> NotVirtual:
    return NotVirtual(
        "a virtual output cannot refer to this source",
        at=quoted(directory),
        cause=cause,
        fix=fix,
    )


def origin_of(checkpoint: Checkpoint, plan: Plan) -> bytes:
    """Return the origin document: an output's own, or one that describes this foreign checkpoint.

    The sidecars that the plan is the first to rewrite are added.
    """
    if checkpoint.origin is not None:
        origin = checkpoint.origin.origin
        known = {name for name, _ in origin.sidecars}
        first = tuple((r.name, r.before) for r in plan.rewrites if r.name not in known)
        if not first:
            return checkpoint.origin.origin_raw
        return origin_bytes(replace(origin, sidecars=(*origin.sidecars, *first)))
    rewritten = tuple((r.name, r.before) for r in plan.rewrites)
    return origin_bytes(replace(checkpoint.as_origin(), sidecars=rewritten))
