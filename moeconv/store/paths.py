"""Names of files: which may be used, where they lead, and what is below a directory."""

from __future__ import annotations

import fnmatch
import os
from pathlib import Path
from typing import Final

from moeconv.core.names import relative_path_problem
from moeconv.errors import UnsafePath, quoted

# directories of git, of huggingface_hub, and of a file system that SRC may be the root of
NEVER_COPIED: Final = frozenset({".git", ".cache", "lost+found"})


def resolve_inside(root: Path, name: str) -> Path:
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
        f"{quoted(name)} links to a file outside the checkpoint",
        at=quoted(str(link)),
        cause=f"it points to {quoted(str(real))}",
        fix="replace the link with the file itself",
    )


def _hub_blobs(root: Path) -> Path | None:
    snapshot = root if root.parent.name == "snapshots" else None
    return None if snapshot is None else snapshot.parent.parent / "blobs"


def refuse_unsafe_name(name: str, where: str) -> None:
    """Raise UnsafePath for a file that could not be named in an output."""
    problem = relative_path_problem(name)
    if problem:
        raise UnsafePath(
            f"{quoted(name)} {problem}",
            at=quoted(where),
            cause="a file of this name cannot be copied safely to every system",
            fix="rename it, or leave it out with `--exclude` if it is not a tensor file",
        )


def matches(name: str, globs: tuple[str, ...]) -> bool:
    """Whether a relative path is one of those that `--exclude` leaves out."""
    return any(fnmatch.fnmatchcase(name, glob) for glob in globs)


def files_below(
    root: Path, *, exclude: tuple[str, ...] = ()
) -> tuple[list[str], dict[str, str | None]]:
    """Relative paths of everything below a folder that is not a folder, in no order.

    exclude: globs; where one leaves out all that a folder may hold, it is not entered.
    Second, folders that cannot be listed, each with the system's reason. Raises OSError for `root`.
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
