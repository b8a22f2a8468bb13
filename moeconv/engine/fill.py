"""Adding to a set the digests that it lacks, once its bytes have been read."""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path

from moeconv.digest import digest
from moeconv.engine.files import NEW_FILE, partial_path, writing
from moeconv.engine.papers import read_back
from moeconv.engine.workplace import fsync_directory
from moeconv.manifest import (
    PARTS_DIR,
    ROOT_NAME,
    FileEntry,
    Manifest,
    addresses,
    part_bytes,
    part_name,
    part_names,
    rank_part_bytes,
    root_bytes,
)


def fill_digests(place: Path, manifest: Manifest, known: dict[str, str]) -> Manifest:
    """Write the parts and the root of a set anew, with digests by address from `known`.

    The root comes last; until then the set is refused as damaged, never read half old, half new.
    Raises IoFailed, DiskFull.
    """
    root = manifest.root
    parts = tuple(
        replace(
            part,
            tensors=tuple(
                replace(t, digests=tuple(known[a] for a in addresses(t, root.stacks)))
                for t in part.tensors
            ),
        )
        for part in manifest.parts
    )
    if root.ep_size is None:
        raws = {part_name(part.file): part_bytes(part) for part in parts}
    else:
        raws = {
            name: rank_part_bytes(rank, tuple(p for p in parts if p.rank == rank))
            for name, rank in part_names(root.ep_size).items()
        }
    entries = tuple(FileEntry(name, len(raw), digest(raw)) for name, raw in raws.items())
    filled = read_back(replace(root, parts=entries, unread=False), raws)
    for name, raw in {**raws, ROOT_NAME: root_bytes(filled.root)}.items():
        _replace(place, name, raw)
    with writing(place):
        fsync_directory(place / PARTS_DIR)
        fsync_directory(place)
    return filled


def _replace(place: Path, name: str, raw: bytes) -> None:
    partial = partial_path(place, name)
    with writing(place / name):
        with os.fdopen(os.open(partial, NEW_FILE, 0o666), "wb") as stream:
            stream.write(raw)
            stream.flush()
            os.fsync(stream.fileno())
        partial.replace(place / name)
