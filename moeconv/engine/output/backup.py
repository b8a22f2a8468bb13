"""The backup of the output that `--overwrite` replaces: where it is, and how it is removed."""

from __future__ import annotations

import stat
from pathlib import Path

from moeconv.checkpoint.output_files import hidden_name
from moeconv.engine.output.journal import JOURNAL_NAME, Journal
from moeconv.engine.output.ownership import OutputInventory
from moeconv.manifest.model import PARTS_DIR, ROOT_NAME


def backup_path(out: Path) -> Path:
    """Return where the old output is kept until the new one is complete."""
    return out.with_name(hidden_name(out.name, ".replaced"))


def recorded_backup(out: Path, journal: Journal | None) -> Path | None:
    """Return the backup that a journal's run made, if it is still there."""
    if journal is None or journal.backup is None:
        return None
    backup = backup_path(out)
    try:
        facts = backup.lstat()
    except OSError:
        return None
    return backup if stat.S_ISDIR(facts.st_mode) and facts.st_ino == journal.backup else None


def remove_output(old: OutputInventory) -> list[str]:
    """Remove the files of an output that have not changed since; return the names of what is left.

    Data files and sidecars go first, then the parts, the journal, and last the root, so that an
    interrupted removal is still recognised as moeconv's. Raises OSError.
    """
    for name in sorted(old.files, key=_last):
        path = old.path / name
        try:
            unchanged = old.files[name].is_of(path.lstat())
        except FileNotFoundError:
            continue
        if not unchanged:
            continue
        if name == ROOT_NAME:
            _remove_folders(old)
        path.unlink(missing_ok=True)
    _remove_folders(old)
    return _remove_if_empty(old.path)


def _last(name: str) -> tuple[int, str]:
    """Return the sort key of a file's removal."""
    if name in (JOURNAL_NAME, ROOT_NAME):
        return 2 + (name == ROOT_NAME), name
    return int(name.startswith(f"{PARTS_DIR}/")), name


def _remove_folders(old: OutputInventory) -> None:
    for name in reversed(old.folders):
        _remove_if_empty(old.path / name)


def _remove_if_empty(folder: Path) -> list[str]:
    """Remove a folder, or return the names of foreign files in it. Raises OSError."""
    try:
        folder.rmdir()
    except FileNotFoundError:
        return []
    except OSError:
        left = sorted(p.name for p in folder.iterdir())
        if not left:
            raise
        return left
    return []
