"""Check OUT before anything is written."""

from __future__ import annotations

import os
from contextlib import suppress
from pathlib import Path

from moeconv.core.text import quoted_list
from moeconv.engine.copy.pool import Limits
from moeconv.engine.output.backup import backup_path, recorded_backup
from moeconv.engine.output.journal import JOURNAL_NAME, is_bare, read_journal
from moeconv.engine.output.ownership import NOT_MADE, OutputInventory, take_inventory
from moeconv.errors import IoFailed, UnsafeOutput, UsageProblem, WouldOverwrite, printable, quoted
from moeconv.manifest.model import PARTS_DIR, ROOT_NAME


def refuse_overlap(src: Path | None, out: Path) -> None:
    """Raise UnsafeOutput if OUT is, contains or is inside SRC; UsageProblem if it is not a path."""
    try:
        with suppress(OSError):
            out.lstat()
    except ValueError as problem:  # a NUL, or what the file system's encoding lacks
        raise UsageProblem(
            f"{quoted(str(out))} is not a path",
            at=quoted(str(out)),
            cause=printable(str(problem)),
            fix="choose a directory that is absent or empty",
        ) from None
    if src is None:  # it is not on this machine
        return
    source = Path(os.path.realpath(src))
    target = Path(os.path.realpath(out))
    if target.is_relative_to(source) or source.is_relative_to(target):
        inside = target.is_relative_to(source)
        word = "is" if target == source else "is inside" if inside else "contains"
        raise UnsafeOutput(
            f"OUT {word} SRC",
            at=quoted(str(out)),
            cause=f"SRC is {quoted(str(source))}; a source is never written to",
            fix="choose a directory elsewhere with `-o`",
        )


def refuse_existing(
    out: Path, *, limits: Limits, overwrite: bool, resume: bool = False, restores: bool = False
) -> OutputInventory | None:
    """Raise WouldOverwrite unless OUT is absent, empty, or an output to be replaced or resumed.

    restores: whether an origin is restored, which has no manifest.
    Returns the inventory of an OUT that is to be replaced.
    """
    if not os.path.lexists(out):
        _refuse_below_file(out)
        if not overwrite and not resume:
            _refuse_left_backup(out, limits)
        return None
    if not out.is_dir():
        raise WouldOverwrite(
            f"{quoted(str(out))} is a {'broken link' if out.is_symlink() else 'file'}",
            at=quoted(str(out)),
            cause="an output must be a directory",
            fix="choose a directory that is absent or empty",
        )
    names = sorted(os.listdir(out))  # noqa: PTH208 - names, not paths
    if not names:
        if not overwrite and not resume:
            _refuse_left_backup(out, limits)
        return None
    if overwrite and Path.cwd().is_relative_to(out):
        raise UsageProblem(
            f"{quoted(str(out))} is the current directory or contains it",
            at=quoted(str(out)),
            cause="the old output is renamed as a whole, and the current directory with it",
            fix="run it from another directory",
        )
    unfinished = PARTS_DIR in names and ROOT_NAME not in names
    if resume and (unfinished or ROOT_NAME in names):
        return None
    if not overwrite:
        raise _in_use(out, names, limits, unfinished=unfinished, restores=restores)
    inventory = take_inventory(out, limits)
    if inventory.foreign:
        raise _not_ours(out, inventory.foreign)
    return inventory


def _refuse_left_backup(out: Path, limits: Limits) -> None:
    """Raise WouldOverwrite if a killed run left a backup of the old output."""
    old = find_backup(out, limits)
    if old is not None:
        raise WouldOverwrite(
            f"a backup of {quoted(str(out))} exists",
            at=quoted(str(old.path)),
            cause="a run with `--overwrite` was killed before it started to write",
            fix="pass `--overwrite` to replace the old output, or move it back",
        )


def _in_use(
    out: Path, names: list[str], limits: Limits, *, unfinished: bool, restores: bool
) -> WouldOverwrite:
    """Return the error for an OUT that is not empty, with a fix for the case at hand."""
    journal = read_journal(out) if unfinished else None
    cause = f"it holds {quoted_list(names, most=1)}"
    fix = "choose another directory"
    if ROOT_NAME in names:
        fix += ", or `--overwrite` to replace what moeconv made here"
    elif restores:
        fix = "choose another directory; `--resume` checks whether this is the restored original"
    if unfinished and (journal is not None or is_bare(out)):
        cause += ": a run of moeconv was killed there"
        fix = "run the same command with `--resume`, or with `--overwrite` to start over"
    elif unfinished:
        cause += f", and neither `{ROOT_NAME}` nor `{JOURNAL_NAME}` lists the other files"
        fix = fix if restores else "choose another directory"
    old = recorded_backup(out, journal)
    if old is not None:
        cause += f"; the old output is at {quoted(str(old))}"
    elif not unfinished and find_backup(out, limits, finished=restores) is not None:
        cause += f"; the rest of an old output is at {quoted(str(backup_path(out)))}"
        fix += "; the same command with `--resume` removes the rest"
    return WouldOverwrite(
        f"{quoted(str(out))} is {'unfinished' if unfinished else 'not empty'}",
        at=quoted(str(out)),
        cause=cause,
        fix=fix,
    )


def _not_ours(out: Path, foreign: dict[str, str]) -> WouldOverwrite:
    """Return the error for an OUT with files that `--overwrite` must not remove."""
    first, reason = next(iter(foreign.items()))
    changed = any(why != NOT_MADE for why in foreign.values())
    return WouldOverwrite(
        f"{quoted(str(out))} holds files that moeconv did not make"
        + (", or that changed since it made them" if changed else ""),
        at=quoted_list([*foreign], most=1),
        cause=f"{quoted(first)}: {reason}; "
        "`--overwrite` replaces only files that moeconv wrote and that have not changed since",
        fix="move them elsewhere, or choose another directory",
    )


def find_backup(out: Path, limits: Limits, *, finished: bool = False) -> OutputInventory | None:
    """Take the inventory of a backup that a killed run left; None if other files are in it.

    It is found by the journal of that run, or by its name where the run was killed before it wrote
    a journal or after it removed it. finished: OUT is known to be complete, though it has no
    manifest. Raises OSError.
    """
    journal, backup = read_journal(out), backup_path(out)
    if journal is not None:
        found = recorded_backup(out, journal)
    else:
        begun = out.exists() and not is_bare(out)
        found = backup if finished or not begun or (out / ROOT_NAME).exists() else None
    if found is None or found.is_symlink() or not found.is_dir():
        return None
    inventory = take_inventory(found, limits)
    return None if inventory.foreign else inventory


def _refuse_below_file(out: Path) -> None:
    place = out.parent
    while not os.path.lexists(place):
        place = place.parent
    if not place.is_dir():
        raise IoFailed(
            f"{quoted(str(out))} cannot be created",
            at=quoted(str(place)),
            cause="this is a file, not a directory",
            fix="choose another location with `-o`",
        )
