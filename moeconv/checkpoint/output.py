"""Read what moeconv wrote: root, parts, origin and index, all checked against their digests."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

from moeconv.checkpoint.header import Header
from moeconv.checkpoint.index import parse_index
from moeconv.checkpoint.origin import Origin, parse_origin
from moeconv.checkpoint.output_files import (
    FILLED_ROOT,
    check_data_file,
    damaged,
    filled_name,
    read_entry,
    read_root,
)
from moeconv.core.names import natural_key
from moeconv.manifest.model import MAX_PART_BYTES, PARTS_DIR, ROOT_NAME, Manifest, Part
from moeconv.manifest.part_reader import parse_parts
from moeconv.manifest.rules import contradictions
from moeconv.store.base import File, Store


@dataclass(frozen=True)
class RecordedDocuments:
    """The documents of an output, already checked against the root's digests."""

    manifest: Manifest
    origin_raw: bytes
    sidecars: tuple[File, ...]

    @cached_property
    def origin(self) -> Origin:
        """The first foreign source; parsed on first use, since it may be large.

        Raises BadManifest, BadHeader, BadJson.
        """
        return parse_origin(self.origin_raw)

    def check_headers(self, files: tuple[tuple[str, int, Header], ...]) -> None:
        """Check (name, size, header) of the data files against their parts. Raises Damaged."""
        for (_, size, header), part in zip(files, self.sorted_parts(), strict=True):
            check_data_file(part, size, header.raw, header)

    def sorted_parts(self) -> tuple[Part, ...]:
        """The parts in the order in which a checkpoint lists its files."""
        return tuple(sorted(self.manifest.parts, key=lambda p: natural_key(p.file)))


def open_output(store: Store) -> RecordedDocuments:
    """Read root, parts, index and origin; sidecars must exist, but are not read.

    Raises Damaged, BadManifest, UnsupportedVersion, MissingShard.
    """
    top = read_root(store)
    parts: list[Part] = []
    for entry in top.parts:
        parts += parse_parts(read_entry(store, entry, limit=MAX_PART_BYTES), top, where=entry.name)
    for cause in contradictions(Manifest(top, tuple(parts))):
        raise damaged(ROOT_NAME, cause)
    origin_raw = read_entry(store, top.origin)
    if top.index is not None:
        # loaders use it, so it must be valid; nothing here needs its content
        parse_index(read_entry(store, top.index), name=top.index.name)
    sidecars = []
    for entry in top.sidecars:
        file = store.file(entry.name)
        if file is None:
            raise damaged(entry.name, "it is missing")
        sidecars.append(file)
    return RecordedDocuments(
        manifest=Manifest(top, tuple(parts)),
        origin_raw=origin_raw,
        sidecars=tuple(sidecars),
    )


def foreign_files(store: Store, manifest: Manifest) -> list[str]:
    """Relative paths of files in an output's directory that its manifest does not name.

    Folders that cannot be listed are among them, with a `/` at the end. Raises SourceMissing.
    """
    top = manifest.root
    named = {ROOT_NAME, f"{PARTS_DIR}/journal"}
    named |= {e.name for e in (*top.parts, *top.sidecars, top.origin)}
    named |= {top.index.name} if top.index else set()
    named |= {p.file for p in manifest.parts}
    named |= {FILLED_ROOT, *(filled_name(e.name) for e in top.parts)}
    return [name for name in store.names() if name not in named]
