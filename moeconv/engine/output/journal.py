"""Read and write the journal of a run, which `--resume` continues from.

Its first line of JSON has the plan's digest and the names of all files. One line follows before
each file is renamed into place, with its size and time, and one per finished data file. The
journal is removed after the manifest is written.
"""

from __future__ import annotations

import fcntl
import io
import os
import threading
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from moeconv.checkpoint.output_files import read_named
from moeconv.core.digest import hasher
from moeconv.core.schema import Problems, Table
from moeconv.core.strict_json import Json, dumps, loads
from moeconv.engine.output.atomic_file import NEW_FILE, writing
from moeconv.errors import CannotResume, MoeconvError, WouldOverwrite, quoted
from moeconv.manifest.model import PARTS_DIR
from moeconv.plan.model import OutputFile, Plan
from moeconv.store.documents import unreadable
from moeconv.store.file_io import append, read_bytes
from moeconv.store.local import LocalStore
from moeconv.version import __version__

JOURNAL_NAME: Final = "moeconv/journal"
MAX_JOURNAL_BYTES: Final = 512 * 1024 * 1024
_TILES_AT_ONCE: Final = 4096
Finished = dict[str, list[list[str]]]  # data file -> digests by tensor and unit


@dataclass(frozen=True, slots=True)
class Journal:
    """The contents of a journal, up to the first incomplete line."""

    plan: str
    names: tuple[str, ...]
    finished: Finished
    made: dict[str, tuple[int, int]]  # size and time of the last write of each file that was made
    backup: int | None = None  # the inode of the old output that the run moved away


def plan_digest(plan: Plan, identity: Json) -> str:
    """Return a digest of all that determines an output's bytes, including the source's identity."""
    state = hasher()
    for doc in (__version__, identity, plan.restores, plan.ep_size, plan.virtual):
        state.update(dumps(doc) + b"\n")
    for recipe in plan.recipes:
        state.update(recipe.toml.encode() + b"\n")
    for rewrite in plan.rewrites:
        state.update(rewrite.name.encode() + b"\n" + rewrite.after)
    for file in plan.files:
        state.update(file.header)
        for at in range(0, len(file.tiles), _TILES_AT_ONCE):  # a million of them are long as a text
            state.update(repr(file.tiles[at : at + _TILES_AT_ONCE]).encode())
    return state.hexdigest()


def read_journal(out: Path) -> Journal | None:
    """Return the journal of an unfinished run; None if it is missing or unreadable."""
    try:
        raw = read_named(LocalStore(out), JOURNAL_NAME, limit=MAX_JOURNAL_BYTES)
        lines = io.BytesIO(raw)
        problems = Problems()
        head = Table(loads(next(lines, b""), where=JOURNAL_NAME), "", problems)
        plan, names = head.digest("plan"), head.texts("names")
        backup = head.integer("aside") if head.has("aside") else None
        refused = problems.count > 0
    except MoeconvError:
        return None
    if refused:
        return None
    finished: Finished = {}
    made: dict[str, tuple[int, int]] = {}
    for line in lines:
        if not line.endswith(b"\n"):
            break  # it was being written
        try:
            entry = Table(loads(line, where=JOURNAL_NAME, hollow=True), "", problems)
        except MoeconvError:
            break
        if entry.has("made"):
            seconds, nanoseconds = (*entry.integers("mtime"), 0, 0)[:2]
            mtime_ns = seconds * 10**9 + nanoseconds
            made[entry.text("made")] = entry.integer("size"), mtime_ns
            continue
        finished[entry.text("file")] = [list(row) for row in entry.text_lists("digests")]
    return None if problems.count else Journal(plan, names, finished, made, backup)


class JournalFile:
    """The open journal, locked until the run ends."""

    def __init__(self, out: Path) -> None:
        self._path = out / JOURNAL_NAME
        self._descriptor = -1
        self._appending = threading.Lock()

    def create(self) -> None:
        """Create and lock the journal. Raises IoFailed, WouldOverwrite."""
        with writing(self._path):
            try:
                self._descriptor = os.open(self._path, NEW_FILE, 0o666)
            except (FileExistsError, FileNotFoundError):  # another run started at the same moment
                raise busy(self._path.parent.parent) from None
        self._lock()

    @property
    def held(self) -> bool:
        """Whether this run has the lock and the journal is in place, so that OUT is its own."""
        if self._descriptor < 0:
            return False
        try:
            there = self._path.lstat()
        except OSError:
            return False
        mine = os.fstat(self._descriptor)
        return (there.st_dev, there.st_ino) == (mine.st_dev, mine.st_ino)

    def begin(self, plan: str, names: tuple[str, ...], backup: int | None = None) -> None:
        """Write the first line: plan, names, inode of the old output. Raises IoFailed."""
        self._append({"plan": plan, "names": list(names), "aside": backup})

    def lock(self) -> None:
        """Lock another run's journal. Raises WouldOverwrite if that run is alive, IoFailed."""
        with writing(self._path):
            self._descriptor = os.open(self._path, os.O_RDWR | os.O_CLOEXEC)
        self._lock()

    def reopen(self) -> None:
        """Continue the locked journal, dropping an incomplete last line. Raises IoFailed."""
        try:
            raw = read_bytes(self._descriptor, os.fstat(self._descriptor).st_size)
        except OSError as problem:
            raise unreadable(self._path, problem, name=JOURNAL_NAME) from None
        with writing(self._path):
            os.ftruncate(self._descriptor, raw.rfind(b"\n") + 1)
            os.lseek(self._descriptor, 0, os.SEEK_END)

    def _lock(self) -> None:
        try:
            fcntl.flock(self._descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            free = self.held  # else the run that had it has just ended and removed it
        except BlockingIOError:
            free = False
        if not free:
            self.close()
            raise busy(self._path.parent.parent)

    def finished(self, file: OutputFile, digests: list[list[str]]) -> None:
        """Record a data file that was renamed into place and fsynced."""
        self._append({"file": file.name, "digests": [list(row) for row in digests]})

    def making(self, name: str, facts: os.stat_result) -> None:
        """Record a complete file that is about to be renamed into place.

        Not fsynced: if the record is lost, the file is treated as not made by moeconv.
        """
        mtime: list[Json] = list(divmod(facts.st_mtime_ns, 10**9))
        self._append({"made": name, "size": facts.st_size, "mtime": mtime}, durable=False)

    def _append(self, doc: Json, *, durable: bool = True) -> None:
        with self._appending, writing(self._path):
            append(self._descriptor, dumps(doc) + b"\n")
            if durable:
                os.fsync(self._descriptor)

    def close(self) -> None:
        """Release the lock."""
        descriptor, self._descriptor = self._descriptor, -1
        if descriptor >= 0:
            with suppress(OSError):  # every record is on the disk already
                os.close(descriptor)


def busy(out: Path) -> WouldOverwrite:
    """Return the error for an OUT that another run is writing to."""
    return WouldOverwrite(
        f"another run is writing to {quoted(str(out))}",
        at=quoted(str(out)),
        cause=f"it has locked `{JOURNAL_NAME}`",
        fix="wait for it, or choose another directory",
    )


def is_bare(out: Path) -> bool:
    """Return whether a directory contains at most `moeconv/` with a journal in it."""
    parts = out / PARTS_DIR
    names = set(os.listdir(out))  # noqa: PTH208 - names, not paths
    if not names <= {PARTS_DIR} or parts.is_symlink():
        return False
    its = {p.name for p in parts.iterdir()} if parts.is_dir() else names
    return its <= {Path(JOURNAL_NAME).name}


def clear_aborted_start(out: Path) -> bool:
    """Remove what is left of a run that was killed before it wrote its journal's first line.

    That is an empty `moeconv/`, or one with an incomplete journal; return whether OUT was that.
    Raises WouldOverwrite if that run is alive, IoFailed.
    """
    path, journal = out / JOURNAL_NAME, JournalFile(out)
    if not is_bare(out):
        return False
    try:
        if path.exists():
            journal.lock()
            if b"\n" in read_named(LocalStore(out), JOURNAL_NAME, limit=MAX_JOURNAL_BYTES):
                return False
        with writing(path):
            path.unlink(missing_ok=True)
            if path.parent.exists():
                path.parent.rmdir()
    finally:
        journal.close()
    return True


def resumable(out: Path, plan: str) -> Journal:
    """Return the journal to continue. Raises CannotResume."""
    journal = read_journal(out)
    if journal is None:
        raise CannotResume(
            f"{quoted(str(out))} cannot be resumed",
            at=quoted(str(out)),
            cause=f"it has no readable `{JOURNAL_NAME}`",
            fix="choose another directory",
        )
    if journal.plan != plan:
        raise CannotResume(
            f"{quoted(str(out))} was started with a different plan",
            at=quoted(str(out)),
            cause="the source, a flag, a recipe or the version of moeconv has changed",
            fix="use the same ones, or start over with `--overwrite`",
        )
    return journal
