"""OUT: may it be written, is there room, and how it is put back when a run does not end well."""

from __future__ import annotations

import os
import shutil
from dataclasses import dataclass, field
from pathlib import Path

from moeconv.checkpoint.sets import read_bounded
from moeconv.engine.files import write_failed
from moeconv.errors import DiskFull, MoeconvError, UnsafeOutput, WouldOverwrite, quoted
from moeconv.manifest import MAX_ROOT_BYTES, PARTS_DIR, ROOT_NAME, Root, parse_root
from moeconv.units import human_size

PARTIAL_SUFFIX = ".partial"


@dataclass(frozen=True, slots=True)
class Room:
    """Free space against what a plan needs, in bytes."""

    needed: int
    free: int

    @property
    def enough(self) -> bool:
        """Whether it fits."""
        return self.needed <= self.free


def refuse_overlap(src: Path, out: Path) -> None:
    """Raise UnsafeOutput where OUT is SRC, lies in it or around it."""
    source = Path(os.path.realpath(src))
    target = Path(os.path.realpath(out))
    if target.is_relative_to(source) or source.is_relative_to(target):
        inside = target.is_relative_to(source)
        word = "is" if target == source else "lies inside" if inside else "holds"
        raise UnsafeOutput(
            f"OUT {word} SRC",
            at=quoted(str(out)),
            cause=f"SRC is {quoted(str(source))}; a source is never written to",
            fix="give a directory elsewhere with `-o`",
        )


def refuse_existing(out: Path, *, overwrite: bool) -> None:
    """Raise WouldOverwrite unless OUT is absent, empty, or ours and to be overwritten."""
    if not out.exists() and not out.is_symlink():
        return
    if not out.is_dir():
        raise WouldOverwrite(
            f"{quoted(str(out))} is a file", fix="give a directory that is absent or empty"
        )
    names = os.listdir(out)  # noqa: PTH208 - names, not paths
    if not names:
        return
    unfinished = PARTS_DIR in names and ROOT_NAME not in names
    if not overwrite:
        raise WouldOverwrite(
            f"{quoted(str(out))} is not empty",
            cause="it holds an unfinished run of moeconv"
            if unfinished
            else f"it holds {quoted(sorted(names)[0])}"
            + (f" and {len(names) - 1} more" if len(names) > 1 else ""),
            fix="give another directory, or `--overwrite` if moeconv made this one",
        )
    strangers = sorted(set(_files_below(out)) - _ours(out))
    if strangers:
        raise WouldOverwrite(
            f"{quoted(str(out))} holds files that moeconv did not make",
            at=quoted(strangers[0]) + (f" and {len(strangers) - 1} more" if strangers[1:] else ""),
            cause="`--overwrite` replaces only what moeconv wrote",
            fix="move them away, or give another directory",
        )


def _files_below(out: Path) -> list[str]:
    return [
        str((Path(folder) / name).relative_to(out))
        for folder, folders, names in os.walk(out)
        for name in (*names, *(f for f in folders if Path(folder, f).is_symlink()))
    ]


def _ours(out: Path) -> set[str]:
    """The files of a set of ours, or those that an unfinished run can have left."""
    mine = {
        name
        for name in _files_below(out)
        if name.startswith(f"{PARTS_DIR}/")
        or (Path(name).name.startswith(".") and name.endswith(PARTIAL_SUFFIX))
    }
    try:
        root: Root = parse_root(read_bounded(out / ROOT_NAME, MAX_ROOT_BYTES, name=ROOT_NAME))
    except MoeconvError:
        return mine
    named = {e.name for e in (*root.parts, root.index, root.origin, *root.sidecars)}
    data = {Path(e.name).name.removesuffix(".json") for e in root.parts}
    return mine | named | data | {ROOT_NAME}


def room_for(out: Path, needed: int) -> Room:
    """Free space where OUT will be."""
    place = Path(os.path.realpath(out))
    while not place.exists():
        place = place.parent
    facts = os.statvfs(place)
    return Room(needed, facts.f_bavail * facts.f_frsize)


def refuse_short(out: Path, room: Room) -> None:
    """Raise DiskFull where the plan does not fit."""
    if not room.enough:
        raise DiskFull(
            f"there is not enough room for {quoted(str(out))}",
            at=quoted(str(out)),
            cause=f"{human_size(room.needed)} are needed, {human_size(room.free)} are free",
            fix="make room, or give a directory on another disk",
        )


def fsync_directory(path: Path) -> None:
    """Make renames in a directory durable."""
    descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@dataclass(slots=True)
class Workplace:
    """OUT while it is being written: remembers what it made, to take it back."""

    out: Path
    made_files: list[Path] = field(default_factory=list)
    made_folders: list[Path] = field(default_factory=list)

    def prepare(self, *, overwrite: bool) -> None:
        """Make OUT and its `moeconv/`, the mark of an unfinished run; clear an old set first."""
        try:
            if overwrite and self.out.exists():
                # the manifest goes first: from here on, nothing takes the old set for whole
                (self.out / ROOT_NAME).unlink(missing_ok=True)
                for entry in list(self.out.iterdir()):
                    if entry.is_dir() and not entry.is_symlink():
                        shutil.rmtree(entry)
                    else:
                        entry.unlink()
            self.folder(self.out / PARTS_DIR)
        except OSError as problem:
            raise write_failed(self.out, problem) from None

    def folder(self, path: Path) -> None:
        """Make a folder and its parents, remembering each."""
        missing = []
        while not path.exists():
            missing.append(path)
            path = path.parent
        for folder in reversed(missing):
            folder.mkdir()
            self.made_folders.append(folder)

    def rename(self, partial: Path, final: Path) -> None:
        """Give a complete file its name."""
        self.made_files.append(final)
        partial.rename(final)

    def take_back(self) -> None:
        """Remove what this run made, as far as it can be removed."""
        for path in self.made_files:
            path.unlink(missing_ok=True)
        if self.out.is_dir():
            for path in self.out.rglob(f".*{PARTIAL_SUFFIX}"):
                path.unlink(missing_ok=True)
        for folder in reversed(self.made_folders):
            try:
                folder.rmdir()
            except OSError:  # somebody else put something there: it stays
                continue
