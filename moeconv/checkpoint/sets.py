"""Reading what moeconv itself wrote: root, parts, origin, index, all held against their digests."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from moeconv.checkpoint.index import Index, parse_index
from moeconv.checkpoint.origin import Origin, parse_origin
from moeconv.checkpoint.reading import read_document
from moeconv.checkpoint.sidecars import Sidecar, inside
from moeconv.digest import digest
from moeconv.errors import Damaged, MissingShard, quoted
from moeconv.manifest import (
    MAX_PAPER_BYTES,
    MAX_PART_BYTES,
    MAX_ROOT_BYTES,
    ROOT_NAME,
    FileEntry,
    Manifest,
    Part,
)
from moeconv.manifestreader import parse_parts, parse_root
from moeconv.names import natural_key


@dataclass(frozen=True, slots=True)
class SetFiles:
    """A set's own documents, already checked against the root's digests."""

    manifest: Manifest
    index: Index | None  # a whole set has one
    origin: Origin
    origin_raw: bytes
    sidecars: tuple[Sidecar, ...]

    def check_headers(self, files: tuple[tuple[str, int, bytes], ...]) -> None:
        """Hold (name, size, raw header) of the data files against their parts. Raises Damaged."""
        for (name, size, raw), part in zip(files, self.sorted_parts(), strict=True):
            if size != part.size or len(raw) != part.header_size:
                raise damaged(name, f"it has {size:,} bytes, its part says {part.size:,}")
            if digest(raw) != part.header_digest:
                raise damaged(name, "its header is not the one that was written")

    def sorted_parts(self) -> tuple[Part, ...]:
        """The parts in the order in which a checkpoint lists its files."""
        return tuple(sorted(self.manifest.parts, key=lambda p: natural_key(p.file)))


def damaged(name: str, cause: str) -> Damaged:
    """The error for a file of a set that is not as it was written."""
    return Damaged(
        f"{quoted(name)} is damaged",
        at=quoted(name),
        cause=cause,
        fix="fetch that file of the set again, or convert again",
    )


def read_bounded(path: Path, limit: int, *, name: str) -> bytes:
    """All bytes of a file of the set, at most `limit`. Raises MissingShard, Malformed, IoFailed."""
    if not path.exists():
        raise MissingShard(
            f"{quoted(name)} is not there",
            at=quoted(ROOT_NAME),
            cause="the set's manifest names it",
            fix="fetch that file of the set again, or convert again",
        )
    return read_document(path, limit, name=name)


def read_entry(root: Path, entry: FileEntry, *, limit: int = MAX_PAPER_BYTES) -> bytes:
    """The bytes of a document that the root names, held against size and digest."""
    path = inside(root, entry.name)
    if path.exists() and path.is_file() and path.stat().st_size != entry.size:
        raise damaged(entry.name, f"its size is not the {entry.size:,} bytes in the manifest")
    raw = read_bounded(path, limit, name=entry.name)
    if len(raw) != entry.size or digest(raw) != entry.digest:
        raise damaged(entry.name, "its digest is not the one in the manifest")
    return raw


def open_set(root: Path) -> SetFiles:
    """Read root, parts, index and origin; sidecars are only looked up, not read.

    Raises Damaged, BadManifest, UnsupportedVersion, MissingShard.
    """
    raw = read_bounded(inside(root, ROOT_NAME), MAX_ROOT_BYTES, name=ROOT_NAME)
    top = parse_root(raw)
    parts: list[Part] = []
    for entry in top.parts:
        raw = read_entry(root, entry, limit=MAX_PART_BYTES)
        parts += parse_parts(raw, top, where=entry.name)
    origin_raw = read_entry(root, top.origin)
    beside = []
    for entry in top.sidecars:
        path = inside(root, entry.name)
        if not path.is_file():
            raise damaged(entry.name, "it is not there")
        stat = path.stat()
        beside.append(Sidecar(entry.name, path, stat.st_size, stat.st_mtime_ns))
    return SetFiles(
        manifest=Manifest(top, tuple(parts)),
        index=parse_index(read_entry(root, top.index), name=top.index.name) if top.index else None,
        origin=parse_origin(origin_raw),
        origin_raw=origin_raw,
        sidecars=tuple(beside),
    )
