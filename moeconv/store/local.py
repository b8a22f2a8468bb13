"""A local directory as a store, and local files."""

from __future__ import annotations

import os
import stat
from dataclasses import dataclass
from pathlib import Path

from moeconv.core.names import natural_key
from moeconv.core.system_errors import explained
from moeconv.errors import SourceChanged, SourceMissing, UnsafePath, quoted
from moeconv.store.documents import opened, unreadable
from moeconv.store.file_io import read_bytes
from moeconv.store.paths import files_below, matches, refuse_unsafe_name, resolve_inside


@dataclass(frozen=True, slots=True)
class LocalFile:
    """A local file as it was when it was looked up; `name` is what messages call it."""

    name: str
    path: Path
    size: int
    mtime_ns: int

    @classmethod
    def at(cls, path: Path, *, name: str) -> LocalFile:
        """The file at a path. Raises IoFailed."""
        try:
            facts = path.stat()
        except OSError as problem:
            raise unreadable(path, problem, name=name) from None
        return cls(name, path, facts.st_size, facts.st_mtime_ns)

    def read(self, offset: int, nbytes: int) -> bytes:
        """Exactly `nbytes` bytes from `offset` on. Raises IoFailed, SourceChanged, UnsafePath."""
        with opened(self.path, name=self.name) as (descriptor, facts):
            if (facts.st_size, facts.st_mtime_ns) != (self.size, self.mtime_ns):
                raise SourceChanged(
                    f"{quoted(self.name)} changed while it was being read",
                    at=quoted(str(self.path)),
                    cause=f"it had {self.size:,} bytes at first and has {facts.st_size:,} now; "
                    "if these are equal, its modification time changed",
                )
            try:
                return read_bytes(descriptor, nbytes, offset)
            except OSError as problem:
                raise unreadable(self.path, problem, name=self.name) from None


class LocalStore:
    """The files below one directory; links may not lead out of it."""

    def __init__(self, root: Path) -> None:
        self.root = root

    @property
    def address(self) -> str:
        """The directory as it was given."""
        return str(self.root)

    def entries(self) -> list[str]:
        """Names directly in the directory, as in `Store`. Raises SourceMissing."""
        try:
            with os.scandir(self.root) as listed:
                found = [
                    f"{e.name}/" if e.is_dir(follow_symlinks=False) else e.name for e in listed
                ]
        except OSError as problem:
            raise self._unlisted(self.root, problem, quoted(self.address)) from None
        return sorted(found, key=natural_key)

    def names(self, *, exclude: tuple[str, ...] = ()) -> list[str]:
        """Names of all files, as in `Store`. Raises SourceMissing."""
        try:
            found, unread = files_below(self.root, exclude=exclude)
        except OSError as problem:
            raise self._unlisted(self.root, problem, quoted(self.address)) from None
        wanted = [n for n in found if not matches(n, exclude)]
        return sorted([*wanted, *(f"{n}/" for n in unread)], key=natural_key)

    def file(self, name: str) -> LocalFile | None:
        """The file of this name, as in `Store`. Raises UnsafePath, SourceMissing, IoFailed."""
        if name.endswith("/"):
            self._refuse_unlisted(name[:-1])
        refuse_unsafe_name(name, self.address)
        path = resolve_inside(self.root, name)
        try:
            facts = path.stat()
        except (FileNotFoundError, NotADirectoryError):
            return None
        except OSError as problem:
            cause, fix = explained(problem, otherwise="restore the file")
            raise SourceMissing(
                f"cannot read {quoted(name)}",
                at=quoted(str(self.root / name)),
                cause=cause,
                fix=f"{fix}, or leave it out with `--exclude`",
            ) from None
        if not stat.S_ISREG(facts.st_mode):
            raise UnsafePath(
                f"{quoted(name)} is not a regular file",
                at=quoted(str(self.root / name)),
                cause="links to directories, sockets and devices are not copied",
                fix="put a regular file in its place, or leave it out with `--exclude`",
            )
        return LocalFile(name, path, facts.st_size, facts.st_mtime_ns)

    def _refuse_unlisted(self, folder: str) -> None:
        try:
            os.listdir(self.root / folder)  # noqa: PTH208 - for its error
        except OSError as problem:
            raise self._unlisted(
                self.root / folder,
                problem,
                quoted(folder),
                fix=f"change its permissions, or leave it out with `--exclude '{folder}/*'`",
            ) from None

    @staticmethod
    def _unlisted(
        place: Path,
        problem: OSError,
        called: str,
        fix: str = "check that the directory is readable",
    ) -> SourceMissing:
        cause, _ = explained(problem, otherwise=fix)
        return SourceMissing(f"cannot list {called}", at=quoted(str(place)), cause=cause, fix=fix)
