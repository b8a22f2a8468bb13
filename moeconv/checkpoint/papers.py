"""The documents of a set on disk: links held in, sizes bounded, digests checked before use."""

from __future__ import annotations

import os
from pathlib import Path

from moeconv.checkpoint.reading import read_document, unreadable
from moeconv.digest import digest
from moeconv.errors import Damaged, MissingShard, UnsafePath, quoted
from moeconv.manifest import MAX_PAPER_BYTES, MAX_ROOT_BYTES, ROOT_NAME, FileEntry, Root
from moeconv.manifestreader import parse_root


def inside(root: Path, name: str) -> Path:
    """The real path of `name` under `root`, links followed.

    A link may lead anywhere inside `root`, or, where `root` is a snapshot of the Hub's cache
    (`models--x/snapshots/COMMIT`), to that repository's own `blobs`. Raises UnsafePath.
    """
    link = root / name
    real = Path(os.path.realpath(link))
    home = Path(os.path.realpath(root))
    if real.is_relative_to(home) or ((blobs := _hub_blobs(home)) and real.is_relative_to(blobs)):
        return real
    raise UnsafePath(
        f"{quoted(name)} is a link out of the checkpoint",
        at=quoted(str(link)),
        cause=f"it leads to {quoted(str(real))}",
        fix="replace the link by the file it should stand for",
    )


def _hub_blobs(root: Path) -> Path | None:
    snapshot = root if root.parent.name == "snapshots" else None
    return None if snapshot is None else snapshot.parent.parent / "blobs"


def damaged(name: str, cause: str) -> Damaged:
    """The error for a file of a set that is not as it was written."""
    return Damaged(
        f"{quoted(name)} is damaged",
        at=quoted(name),
        cause=cause,
        fix="fetch that file of the set again, or convert again",
    )


def missing(name: str) -> MissingShard:
    """The error for a file of a set that is not there."""
    return MissingShard(
        f"{quoted(name)} is not there",
        at=quoted(ROOT_NAME),
        cause="the set's manifest names it",
        fix="fetch that file of the set again, or convert again",
    )


def read_bounded(path: Path, limit: int, *, name: str) -> bytes:
    """All bytes of a file of the set, at most `limit`. Raises MissingShard, Malformed, IoFailed."""
    try:
        there = path.exists()
    except OSError as problem:
        raise unreadable(path, problem, name=name) from None
    if not there:
        raise missing(name)
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


def read_root(root: Path) -> Root:
    """The root of the set in a directory. Raises Damaged, BadManifest, MissingShard, IoFailed."""
    return parse_root(read_bounded(inside(root, ROOT_NAME), MAX_ROOT_BYTES, name=ROOT_NAME))
