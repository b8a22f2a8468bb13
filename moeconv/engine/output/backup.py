"""The backup of the output that `--overwrite` replaces: where it is, and how it is removed."""

from __future__ import annotations

import os
import stat
from dataclasses import dataclass
from pathlib import Path

from moeconv.checkpoint.output_files import hidden_name
from moeconv.engine.output.journal import JOURNAL_NAME, Journal
from moeconv.engine.output.ownership import Inventory
from moeconv.manifest.model import PARTS_DIR, ROOT_NAME


@dataclass(frozen=True, slots=True)
class OldOutput:
    """A directory to be replaced, and which files in it moeconv made."""

    path: Path
    inventory: Inventory


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


def remove_output(old: OldOutput) -> bool:
    """Remove the files in an output's inventory that have not changed since; return if all is gone.

    Data files and sidecars go first, then the parts, the journal, and last the root, so that an
    interrupted removal is still recognised as ours. Raises OSError.
    """
    path, files = old.path, old.inventory.files
    for name in sorted(files, key=_last):
        place = path / name
        try:
            unchanged = files[name].is_of(place.lstat())
        except FileNotFoundError:
            continue
        if not unchanged:
            continue
        if name == ROOT_NAME:
            _remove_folders(path, old.inventory.folders)
        _remove(place)
    _remove_folders(path, old.inventory.folders)
    return _removed_folder(path)


def _last(name: str) -> tuple[int, str]:
    """Return the sort key of a file's removal."""
    if name in (JOURNAL_NAME, ROOT_NAME):
        return 2 + (name == ROOT_NAME), name
    return int(name.startswith(f"{PARTS_DIR}/")), name


def _remove_folders(path: Path, folders: tuple[str, ...]) -> None:
    for name in reversed(folders):
        _removed_folder(path / name)


def _removed_folder(path: Path) -> bool:
    """Remove a folder if nothing is in it; whether it is gone."""
    if not os.path.lexists(path):
        return True
    try:
        _remove(path)
    except OSError:
        if path.is_symlink() or not path.is_dir() or not any(path.iterdir()):
            raise
        return False  # someone put something there
    return True


def _remove(path: Path) -> None:
    """Remove one file, or one folder that is empty."""
    if path.is_dir() and not path.is_symlink():
        path.rmdir()
    else:
        path.unlink(missing_ok=True)
