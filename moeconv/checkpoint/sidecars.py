"""Everything of a checkpoint that is not its tensors: copied byte for byte, links held in."""

from __future__ import annotations

import fnmatch
import os
import stat
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from moeconv.checkpoint.output_files import inside
from moeconv.core.names import natural_key, relative_path_problem
from moeconv.errors import MissingShard, SourceMissing, UnsafePath, quoted

# of git, of huggingface_hub, and of the file system that SRC may be mounted as
NEVER_COPIED: Final = frozenset({".git", ".cache", "lost+found"})


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
            fix=f"give yourself the right to read it, or leave it out with `--exclude '{name}/*'`",
        )
    wanted = [n for n in names if n not in skip and not matches(n, exclude)]
    return tuple(sidecar(root, name) for name in sorted(wanted, key=natural_key))


def matches(name: str, globs: tuple[str, ...]) -> bool:
    """Whether a relative path is one of those that `--exclude` leaves out."""
    return any(fnmatch.fnmatchcase(name, glob) for glob in globs)


def files_below(
    root: Path, *, exclude: tuple[str, ...] = ()
) -> tuple[list[str], dict[str, str | None]]:
    """Relative paths of everything below a folder that is not a folder, in no order.

    exclude: globs; where one leaves out all that a folder may hold, it is not entered.
    Second, folders that cannot be listed, with what the system says. Raises OSError for `root`.
    """
    whole = tuple(glob for glob in exclude if glob.endswith("*"))
    found: list[str] = []
    unread: dict[str, str | None] = {}
    waiting = [""]
    while waiting:  # not by recursion: folders may be thousands deep
        below = waiting.pop()
        try:
            with os.scandir(f"{root}/{below}") as listed:  # a Path would be taken apart each time
                entries = [(e.name, e.is_dir(follow_symlinks=False)) for e in listed]
        except OSError as problem:
            if not below:
                raise
            unread[below] = problem.strerror
            continue
        for own_name, is_folder in entries:
            name = f"{below}/{own_name}" if below else own_name
            if own_name in NEVER_COPIED:
                continue
            if not is_folder:
                found.append(name)
            elif not matches(f"{name}/", whole):
                waiting.append(name)
    return found, unread


def refuse_unsafe_name(name: str, root: Path) -> None:
    """Raise UnsafePath for a file that could not be named in an output."""
    problem = relative_path_problem(name)
    if problem:
        raise UnsafePath(
            f"{quoted(name)} {problem}",
            at=quoted(str(root)),
            cause="a file of this name cannot be copied safely to every system",
            fix="rename it, or leave it out with `--exclude` if it is no tensor file",
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
