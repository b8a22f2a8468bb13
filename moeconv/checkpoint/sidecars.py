"""Sidecars: the files of a checkpoint that hold no tensors. They are copied byte for byte."""

from __future__ import annotations

import stat
from dataclasses import dataclass
from pathlib import Path

from moeconv.core.names import natural_key
from moeconv.errors import SourceMissing, UnsafePath, quoted
from moeconv.store.paths import files_below, matches, refuse_unsafe_name, resolve_inside


@dataclass(frozen=True, slots=True)
class Sidecar:
    """A file beside the tensors: path relative to the checkpoint, where its bytes are, size."""

    name: str
    path: Path
    size: int
    mtime_ns: int


def sidecars(root: Path, *, skip: frozenset[str], exclude: tuple[str, ...]) -> tuple[Sidecar, ...]:
    """All regular files below `root` in natural order, less the tensors' own and `exclude`.

    skip: top-level names that are not sidecars; exclude: globs on relative paths. A folder of
    which a glob leaves out everything is not entered.
    Raises UnsafePath, SourceMissing.
    """
    names, unread = files_below(root, exclude=exclude)
    if unread:
        name, cause = next(iter(unread.items()))
        raise SourceMissing(
            f"cannot list {quoted(name)}",
            at=quoted(str(root / name)),
            cause=cause,
            fix=f"change its permissions, or leave it out with `--exclude '{name}/*'`",
        )
    wanted = [n for n in names if n not in skip and not matches(n, exclude)]
    return tuple(sidecar(root, name) for name in sorted(wanted, key=natural_key))


def sidecar(root: Path, name: str) -> Sidecar:
    """One sidecar by its relative path. Raises UnsafePath, SourceMissing."""
    refuse_unsafe_name(name, root)
    path = resolve_inside(root, name)
    try:
        facts = path.stat()
    except OSError as failure:
        raise SourceMissing(
            f"cannot read {quoted(name)}",
            at=quoted(str(root / name)),
            cause=failure.strerror,
            fix="restore the file, or leave it out with `--exclude`",
        ) from None
    if not stat.S_ISREG(facts.st_mode):
        raise UnsafePath(
            f"{quoted(name)} is not a regular file",
            at=quoted(str(root / name)),
            cause="links to directories, sockets and devices are not copied",
            fix="remove it, or leave it out with `--exclude`",
        )
    return Sidecar(name, path, facts.st_size, facts.st_mtime_ns)
