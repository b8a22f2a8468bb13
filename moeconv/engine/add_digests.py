"""Add the digests that an output lacks to its manifest, after its bytes were read."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from moeconv.checkpoint.output_files import (
    FILLED_ROOT,
    FILLED_SUFFIX,
    damaged,
    filled_name,
    read_root,
)
from moeconv.core.digest import digest
from moeconv.engine.manifest_writer import document, grouped, read_back
from moeconv.engine.output.atomic_file import fsync_directory, write_new, writing
from moeconv.errors import quoted
from moeconv.manifest.model import (
    MAX_PART_BYTES,
    PARTS_DIR,
    ROOT_NAME,
    FileEntry,
    Manifest,
    addresses,
)
from moeconv.manifest.writer import root_bytes
from moeconv.store.documents import read_document
from moeconv.store.local import LocalFile, LocalStore


def fill_digests(place: Path, manifest: Manifest, known: dict[str, str]) -> Manifest:
    """Rewrite the parts and the root of an output with digests by address from `known`.

    New parts are written under hidden names first; then the root is replaced atomically. An
    interruption before that changes nothing; after it readers use the hidden parts, until
    `finish_fill` renames them. Raises IoFailed, DiskFull, Damaged if `known` lacks a matrix.
    """
    root = manifest.root
    for address in (
        a for p in manifest.parts for t in p.tensors for a in addresses(t, root.stacks)
    ):
        if address not in known:
            raise damaged(ROOT_NAME, f"its parts name {quoted(address)}, which no tensor has")
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
    groups = grouped(parts, root.ep_size)
    raws = {name: document(name, parts, root.ep_size) for name, parts in groups.items()}
    entries = tuple(FileEntry(name, len(raw), digest(raw)) for name, raw in raws.items())
    filled = read_back(replace(root, parts=entries, unread=False), groups)
    for name, raw in raws.items():
        _write(place, filled_name(name), raw)
    with writing(place):
        fsync_directory(place / PARTS_DIR)
    _write(place, FILLED_ROOT, root_bytes(filled.root))
    with writing(place):
        (place / FILLED_ROOT).replace(place / ROOT_NAME)
        fsync_directory(place)
    finish_fill(place)
    return filled


def finish_fill(place: Path) -> None:
    """Finish an interrupted fill: rename the new parts that the root names, remove the others.

    The others are of a fill that did not reach its root. Raises IoFailed, and what reading the
    root raises.
    """
    new_parts = sorted((place / PARTS_DIR).glob(f".*{FILLED_SUFFIX}"))
    if not new_parts:
        return
    wanted = {filled_name(e.name): e for e in read_root(LocalStore(place)).parts}
    for path in new_parts:
        name = f"{PARTS_DIR}/{path.name}"
        entry = wanted.get(name)
        raw = b"" if entry is None else read_document(LocalFile.at(path, name=name), MAX_PART_BYTES)
        with writing(path):
            if entry is not None and digest(raw) == entry.digest:
                path.replace(place / entry.name)
            else:
                path.unlink()
    with writing(place):
        fsync_directory(place / PARTS_DIR)


def _write(place: Path, name: str, raw: bytes) -> None:
    path = place / name
    with writing(path):
        path.unlink(missing_ok=True)  # of a fill that was interrupted
        write_new(path, raw)
