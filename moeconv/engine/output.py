"""OUT: may it be written, and how it is put back when a run does not end well."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Final

from moeconv.checkpoint.papers import read_bounded
from moeconv.checkpoint.reading import file_digest
from moeconv.engine.aside import beside, noted_aside
from moeconv.engine.files import PARTIAL_SUFFIX
from moeconv.engine.journal import JOURNAL_NAME, ours_by_journal, read_journal
from moeconv.errors import (
    IoFailed,
    MoeconvError,
    UnsafeOutput,
    UsageProblem,
    WouldOverwrite,
    quoted,
)
from moeconv.manifest import (
    MAX_PART_BYTES,
    MAX_ROOT_BYTES,
    PARTS_DIR,
    ROOT_NAME,
    Root,
    data_name,
)
from moeconv.manifestreader import parse_parts, parse_root

MAX_COMPARED_BYTES: Final = 64 * 1024 * 1024


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


def refuse_existing(out: Path, *, overwrite: bool, resume: bool = False) -> None:
    """Raise WouldOverwrite unless OUT is absent, empty, or ours and to be replaced or resumed."""
    if not os.path.lexists(out):
        _refuse_below_file(out)
        return
    if not out.is_dir():
        raise WouldOverwrite(
            f"{quoted(str(out))} is a {'link to nowhere' if out.is_symlink() else 'file'}",
            at=quoted(str(out)),
            cause="an output is a directory",
            fix="give a directory that is absent or empty",
        )
    names = sorted(os.listdir(out))  # noqa: PTH208 - names, not paths
    if not names:
        return
    if overwrite and Path.cwd().is_relative_to(out):
        raise UsageProblem(
            f"{quoted(str(out))} is where you are",
            at=quoted(str(out)),
            cause="the old output is put aside as a whole, and you would go with it",
            fix="run it from another directory",
        )
    unfinished = PARTS_DIR in names and ROOT_NAME not in names
    if resume and (unfinished or ROOT_NAME in names):
        return
    if not overwrite:
        more = f" and {len(names) - 1} more" if len(names) > 1 else ""
        old = noted_aside(out, read_journal(out)) if unfinished else None
        raise WouldOverwrite(
            f"{quoted(str(out))} is {'half-done' if unfinished else 'not empty'}",
            at=quoted(str(out)),
            cause=f"it holds {quoted(names[0])}{more}"
            + (": a run of moeconv was killed there" if unfinished else "")
            + (f"; the old output is at {quoted(str(old))}" if old else ""),
            fix="run the same command with `--resume`, or with `--overwrite` to start anew"
            if unfinished
            else "give another directory, or `--overwrite` if moeconv made this one",
        )
    others = strangers(out)
    if others:
        raise WouldOverwrite(
            f"{quoted(str(out))} holds files that moeconv did not make",
            at=quoted(others[0]) + (f" and {len(others) - 1} more" if others[1:] else ""),
            cause="`--overwrite` replaces only what moeconv wrote and nobody changed since",
            fix="move them away, or give another directory",
        )


def strangers(out: Path) -> list[str]:
    """The files in OUT that moeconv did not make, or that somebody changed since."""
    return sorted(set(_files_below(out)) - _ours(out))


def left_aside(out: Path) -> Path | None:
    """The old output of an overwriting run that was killed; None unless it is wholly ours.

    The journal of that run notes it. There is none where the run had come to its end all but this,
    or had not made anything yet.
    """
    journal, aside = read_journal(out), beside(out)
    if journal is not None:
        found = noted_aside(out, journal)
    else:
        begun = out.exists() and set(_files_below(out)) - {JOURNAL_NAME}
        found = aside if not begun or (out / ROOT_NAME).exists() else None
    if found is None or found.is_symlink() or not found.is_dir():
        return None
    known = (found / ROOT_NAME).exists() or (found / PARTS_DIR).is_dir()
    return found if known and not strangers(found) else None


def _refuse_below_file(out: Path) -> None:
    place = out.parent
    while not os.path.lexists(place):
        place = place.parent
    if not place.is_dir():
        raise IoFailed(
            f"{quoted(str(out))} cannot be made",
            at=quoted(str(place)),
            cause="this is a file, not a directory",
            fix="give another place with `-o`",
        )


def _files_below(out: Path) -> list[str]:
    return [
        str((Path(folder) / name).relative_to(out))
        for folder, folders, names in os.walk(out)
        for name in (*names, *(f for f in folders if Path(folder, f).is_symlink()))
    ]


def _ours(out: Path) -> set[str]:
    """The files of a set of ours, or those that the journal of an unfinished run announces."""
    mine = {
        name
        for name in _files_below(out)
        if name == JOURNAL_NAME
        or (name.startswith(f"{PARTS_DIR}/.") and name.endswith(PARTIAL_SUFFIX))
    }
    try:
        if (out / ROOT_NAME).exists():
            raw = read_bounded(out / ROOT_NAME, MAX_ROOT_BYTES, name=ROOT_NAME)
            root = parse_root(raw)
            return (mine | set(_named(root)) | _data_files(out, root)) - _edited(out, root)
        return mine | ours_by_journal(out)
    except MoeconvError:
        return mine


def _data_files(out: Path, root: Root) -> set[str]:
    if root.ep_size is None:
        return {data_name(e.name) for e in root.parts}
    raws = ((e.name, read_bounded(out / e.name, MAX_PART_BYTES, name=e.name)) for e in root.parts)
    return {p.file for name, raw in raws for p in parse_parts(raw, root, where=name)}


def _edited(out: Path, root: Root) -> set[str]:
    """Sidecars that somebody changed since: theirs now, not ours."""
    return {
        e.name
        for e in root.sidecars
        if e.size <= MAX_COMPARED_BYTES
        and (out / e.name).is_file()
        and file_digest(out / e.name, name=e.name) != e.digest
    }


def _named(root: Root) -> list[str]:
    papers = [*root.parts, root.origin, *root.sidecars, *([root.index] if root.index else [])]
    return [*(e.name for e in papers), ROOT_NAME]
