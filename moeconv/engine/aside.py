"""The old output, put aside by `--overwrite`: where it waits, whose it is, and how it goes."""

from __future__ import annotations

import shutil
import stat
from pathlib import Path

from moeconv.checkpoint.papers import hidden_name
from moeconv.engine.journal import JOURNAL_NAME, Journal
from moeconv.manifest import PARTS_DIR, ROOT_NAME


def beside(out: Path) -> Path:
    """Where the old output waits until the new one stands."""
    return out.with_name(hidden_name(out.name, ".replaced"))


def noted_aside(out: Path, journal: Journal | None) -> Path | None:
    """The old output that a journal's run put aside, if it is still there."""
    if journal is None or journal.aside is None:
        return None
    aside = beside(out)
    try:
        facts = aside.lstat()
    except OSError:
        return None
    return aside if stat.S_ISDIR(facts.st_mode) and facts.st_ino == journal.aside else None


def remove_output(path: Path) -> None:
    """Remove an output; what says whose it is goes last, so that a kill leaves no riddle.

    Raises OSError.
    """
    parts, root, journal = path / PARTS_DIR, path / ROOT_NAME, path / JOURNAL_NAME
    for entry in path.iterdir():
        if entry not in {parts, root}:
            _remove(entry)
    if parts.is_dir() and not parts.is_symlink():
        for entry in parts.iterdir():
            if entry != journal:
                _remove(entry)
    _remove(parts)
    _remove(root)
    path.rmdir()


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)
