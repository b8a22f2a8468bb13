"""Everything of a checkpoint that is not its tensors: copied byte for byte, links held in."""

from __future__ import annotations

import fnmatch
import os
import stat
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from moeconv.checkpoint.papers import inside
from moeconv.errors import MissingShard, SourceMissing, UnsafePath, quoted
from moeconv.names import natural_key, relative_path_problem

NEVER_COPIED: Final = frozenset({".git", ".cache"})


@dataclass(frozen=True, slots=True)
class Sidecar:
    """A file beside the tensors: path relative to the checkpoint, where its bytes are, size."""

    name: str
    path: Path
    size: int
    mtime_ns: int


def existing(root: Path, name: str, *, named_by: str) -> Path:
    """`inside`, for a shard that must be a regular file. Raises MissingShard, UnsafePath."""
    path = inside(root, name)
    if not path.is_file():
        raise MissingShard(
            f"{quoted(name)} is not there",
            at=quoted(named_by),
            cause=f"{quoted(named_by)} names it, the directory lacks it",
            fix="download the shard, then `moeconv inspect SRC`",
        )
    return path


def sidecars(root: Path, *, skip: frozenset[str], without: tuple[str, ...]) -> tuple[Sidecar, ...]:
    """All regular files below `root` in natural order, less the tensors' own and `without`.

    skip: top-level names that are not sidecars; without: globs on relative paths.
    Raises UnsafePath, SourceMissing.
    """
    names = sorted(files_below(root, ""), key=natural_key)
    wanted = [n for n in names if n not in skip and not _left_out(n, without)]
    return tuple(sidecar(root, name) for name in wanted)


def _left_out(name: str, without: tuple[str, ...]) -> bool:
    return any(fnmatch.fnmatchcase(name, glob) for glob in without)


def files_below(root: Path, below: str = "") -> list[str]:
    """Relative paths of everything below a folder that is not a folder itself."""
    found = []
    with os.scandir(root / below) as entries:
        for entry in entries:
            if entry.name in NEVER_COPIED:
                continue
            name = f"{below}/{entry.name}" if below else entry.name
            if entry.is_dir(follow_symlinks=False):
                found += files_below(root, name)
            else:
                found.append(name)
    return found


def refuse_unsafe_name(name: str, root: Path) -> None:
    """Raise UnsafePath for a file that could not be named in an output."""
    problem = relative_path_problem(name)
    if problem:
        raise UnsafePath(
            f"{quoted(name)} {problem}",
            at=quoted(str(root)),
            cause="a file of this name cannot be copied safely to every system",
            fix="rename it, or leave it out with `--without` if it is no tensor file",
        )


def sidecar(root: Path, name: str) -> Sidecar:
    """One sidecar by its relative path. Raises UnsafePath, SourceMissing."""
    refuse_unsafe_name(name, root)
    path = inside(root, name)
    try:
        facts = path.stat()
    except OSError as failure:
        raise SourceMissing(
            f"cannot read {quoted(name)}",
            at=quoted(str(root / name)),
            cause=failure.strerror,
            fix="restore the file, or leave it out with `--without`",
        ) from None
    if not stat.S_ISREG(facts.st_mode):
        raise UnsafePath(
            f"{quoted(name)} is not a regular file",
            at=quoted(str(root / name)),
            cause="links to directories, sockets and devices are not copied",
            fix="remove it, or leave it out with `--without`",
        )
    return Sidecar(name, path, facts.st_size, facts.st_mtime_ns)
