"""Write OUT as a transaction: one run at a time; a failed run removes what it made."""

from __future__ import annotations

import os
from collections.abc import Collection
from contextlib import suppress
from dataclasses import dataclass, field, replace
from pathlib import Path

from moeconv.core.signals import defer_signals
from moeconv.engine.copy.pool import Limits
from moeconv.engine.output.atomic_file import PARTIAL_SUFFIX, fsync_directory, writing
from moeconv.engine.output.backup import backup_path, remove_output
from moeconv.engine.output.journal import (
    JOURNAL_NAME,
    Journal,
    JournalFile,
    busy,
    clear_aborted_start,
)
from moeconv.engine.output.ownership import OutputInventory, unfinished_file_problem
from moeconv.engine.output.preflight import find_backup
from moeconv.errors import IoFailed, WouldOverwrite, quoted
from moeconv.manifest.model import PARTS_DIR, ROOT_NAME


def _state(facts: os.stat_result) -> tuple[int, int, int]:
    """Return what changes if a file is written to or replaced."""
    return facts.st_ino, facts.st_size, facts.st_mtime_ns


def _interfered(path: Path, what: str) -> IoFailed:
    """Return the error for a file in OUT that another program made or changed."""
    return IoFailed(
        f"{quoted(path.name)} {what}",
        at=quoted(str(path)),
        cause="another program is writing there",
        fix="choose a directory that nothing else writes to",
    )


def end_run(out: Path, limits: Limits, *, restored: bool = False) -> tuple[str, ...]:
    """Finish a run that was killed after its commit: remove its journal and the old output.

    restored: OUT is a restored origin, so all of `moeconv/` is removed. Returns notes.
    Raises WouldOverwrite if that run is still alive, IoFailed.
    """
    work = OutputTransaction(out, limits)
    try:
        work.lock()
        with writing(out):
            work.backup = find_backup(out, limits, finished=restored)
            if work.journal is not None:
                (out / JOURNAL_NAME).unlink()
                fsync_directory(out / PARTS_DIR)
            if restored and (out / PARTS_DIR).exists():
                (out / PARTS_DIR).rmdir()
                fsync_directory(out)
    finally:
        work.close()
    if work.backup is None and os.path.lexists(backup_path(out)):
        place = quoted(str(backup_path(out)))
        return (f"{place} is kept: not everything in it is as moeconv wrote it",)
    return work.drop_old()


@dataclass(slots=True)
class OutputTransaction:
    """The changes that a run makes to OUT, by inode, so that they can be rolled back."""

    out: Path
    limits: Limits
    replaced: OutputInventory | None = None  # what is in OUT before the run
    made_files: list[Path] = field(default_factory=list)
    named: dict[Path, tuple[int, int, int]] = field(default_factory=dict)  # what is in place
    made_folders: list[Path] = field(default_factory=list)
    backup: OutputInventory | None = None  # the old output, until the new one is complete
    journal: JournalFile | None = None
    keeps: bool = False  # whether finished files stay if the run fails, to be resumed

    def prepare(self, plan: str, names: tuple[str, ...], *, overwrite: bool) -> None:
        """Create OUT with `moeconv/` and a journal that lists `names`.

        An old output is renamed, not deleted: it is moved back if this run fails.
        Raises WouldOverwrite if another run is writing there, IoFailed, DiskFull.
        """
        if overwrite:  # refuse an old output that another run is writing to
            self.lock()
            self.close()
        with defer_signals(), writing(self.out):
            old = self._move_to_backup() if overwrite or self.keeps else None
            self.folder(self.out)
            try:
                (self.out / PARTS_DIR).mkdir()
            except FileExistsError:
                raise busy(self.out) from None
            self.made_folders.append(self.out / PARTS_DIR)
            self.journal = JournalFile(self.out)
            self.journal.create()
        self.journal.begin(plan, names, old)

    def lock(self) -> None:
        """Lock the journal that another run left, if there is one.

        Raises WouldOverwrite if that run is still alive, IoFailed.
        """
        if (self.out / JOURNAL_NAME).exists():
            self.journal = JournalFile(self.out)
            self.journal.lock()

    def reopen(self, journal: Journal, kept: Collection[str]) -> None:
        """Continue a run that was killed: remove its files but the `kept` ones.

        Call `lock` first. Raises IoFailed.
        """
        self.keeps = True
        with writing(self.out):
            self.backup = find_backup(self.out, self.limits)
        if self.journal is not None:
            self.journal.reopen()
        staying = {*kept, JOURNAL_NAME}
        with writing(self.out):
            for path in (self.out / PARTS_DIR).glob(f".*{PARTIAL_SUFFIX}"):
                path.unlink()
            for name in journal.names:
                if name not in staying:
                    (self.out / name).unlink(missing_ok=True)
            for name in kept:
                self.named[self.out / name] = _state((self.out / name).lstat())

    def refuse_appeared(self, journal: Journal) -> None:
        """Raise WouldOverwrite for files that `reopen` would remove but the run did not make."""
        for name in journal.names:
            if name in journal.finished or not os.path.lexists(self.out / name):
                continue  # a data file is read again, and made anew where it is damaged
            reason = unfinished_file_problem(journal, name, (self.out / name).lstat())
            if reason is not None:
                raise WouldOverwrite(
                    f"{quoted(name)} is in the way",
                    at=quoted(str(self.out / name)),
                    cause=reason,
                )

    def _move_to_backup(self) -> int | None:
        """Rename an old output in OUT to its backup; return its inode, None if there is none.

        A backup that a killed run left is still the old output.
        """
        backup, left = backup_path(self.out), find_backup(self.out, self.limits)
        there = self.out.is_dir() and any(self.out.iterdir())
        if left is not None and (self.out / ROOT_NAME).exists():
            remove_output(left)  # of a run that was killed after its commit
        elif left is not None:
            if self.out.is_dir():
                self._clear()
            self.backup = left
            return left.path.stat().st_ino
        if not there:
            return None
        if os.path.lexists(backup):
            raise WouldOverwrite(
                f"{quoted(str(backup))} is in the way",
                at=quoted(str(backup)),
                cause="the old output would be moved there, and it contains something else, or "
                "files of an old output that have changed",
            )
        self.out.rename(backup)
        self.backup = replace(self.replaced or OutputInventory(backup), path=backup)
        return backup.stat().st_ino

    def _clear(self) -> None:
        """Remove the unfinished output that a killed run left in OUT."""
        if self.replaced is None:  # at most an empty `moeconv/`
            clear_aborted_start(self.out)
            self.out.rmdir()
        elif remove_output(self.replaced):
            raise WouldOverwrite(
                f"{quoted(str(self.out))} is in the way",
                at=quoted(str(self.out)),
                cause="it was written to a moment ago",
                fix="look at what is there, then run again",
            )

    def folder(self, path: Path) -> None:
        """Create a folder and its missing parents, and record each for the rollback."""
        missing = []
        while not path.exists():
            missing.append(path)
            path = path.parent
        for folder in reversed(missing):
            # two runs may make the same parent
            with suppress(FileExistsError), defer_signals():
                folder.mkdir()
                self.made_folders.append(folder)

    def rename(self, partial: Path, final: Path) -> None:
        """Rename a complete file to its final name. Raises IoFailed if that name exists."""
        with writing(final):
            if os.path.lexists(final):
                raise _interfered(final, "appeared in OUT while it was being written")
            facts = partial.lstat()
            self.made_files.append(final)
            self.named[final] = _state(facts)
            if self.journal is not None:
                self.journal.making(final.relative_to(self.out).as_posix(), facts)
            partial.rename(final)

    def refuse_changed(self) -> None:
        """Raise IoFailed if a finished file was changed or replaced since."""
        for path, state in self.named.items():
            with writing(path):
                if _state(path.lstat()) != state:
                    raise _interfered(path, "was changed in OUT before the output was complete")

    def done(self, *, restored: bool) -> None:
        """Complete the output: remove the journal, and for a restored origin all of `moeconv/`."""
        with writing(self.out):
            (self.out / JOURNAL_NAME).unlink()
            if restored:
                (self.out / PARTS_DIR).rmdir()
            for folder in {self.out, *(f.parent for f in self.made_folders)}:
                if folder.exists():
                    fsync_directory(folder)

    def drop_old(self) -> tuple[str, ...]:
        """Remove the old output; the new one is complete, so nothing here can make the run fail.

        Returns notes about it.
        """
        if self.backup is None:
            return ()
        notes, path = self.backup.notes, quoted(str(self.backup.path))
        while True:
            try:
                if self.backup.path.exists() and remove_output(self.backup):
                    return (*notes, f"files of the old output that changed meanwhile are at {path}")
            except KeyboardInterrupt:
                continue
            except OSError as problem:
                left = f"the rest of the old output is at {path}: {problem.strerror}"
                return (*notes, f"{left}; the same command with `--resume` removes it")
            return notes

    def close(self) -> None:
        """Release the lock."""
        if self.journal is not None:
            self.journal.close()

    def roll_back(self) -> str | None:
        """Remove what this run made and move the old output back; return what could not be."""
        ours = self.journal is not None and self.journal.held
        if ours:  # else they are of a run that is still alive
            with suppress(OSError):  # if the folder cannot be listed, they stay
                for path in (self.out / PARTS_DIR).glob(f".*{PARTIAL_SUFFIX}"):
                    with suppress(OSError):
                        path.unlink()
        if self.keeps and ours:
            old = self._where_old()
            return "; ".join(filter(None, ("`--resume` continues from what is finished", old)))
        for path in reversed(self.made_files):  # the manifest first
            with suppress(OSError):
                if _state(path.lstat()) == self.named[path]:
                    path.unlink()  # else another program changed it meanwhile
        if ours:
            with suppress(OSError):
                (self.out / JOURNAL_NAME).unlink()
        for folder in reversed(self.made_folders):
            with suppress(OSError):  # not empty: another program put something there
                folder.rmdir()
        if self.backup is None or not self.backup.path.exists():
            return None
        with suppress(OSError):
            if not os.path.lexists(self.out):
                self.backup.path.rename(self.out)
                return None
        return self._where_old()

    def _where_old(self) -> str | None:
        if self.backup is None or not self.backup.path.exists():
            return None
        return f"the old output is at {quoted(str(self.backup.path))}"
