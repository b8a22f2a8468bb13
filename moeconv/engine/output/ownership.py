"""Find which files in OUT were written by moeconv and are unchanged since."""

from __future__ import annotations

import os
import stat
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import NamedTuple

from moeconv.checkpoint.header import read_header
from moeconv.checkpoint.model import DataFile
from moeconv.checkpoint.output_files import (
    FILLED_ROOT,
    filled_name,
    read_entry,
    read_named,
    read_root,
)
from moeconv.core.digest import digest
from moeconv.core.text import counted
from moeconv.engine.copy.pool import Limits, digests_of
from moeconv.engine.manifest_writer import part_of
from moeconv.engine.output.atomic_file import PARTIAL_SUFFIX
from moeconv.engine.output.journal import JOURNAL_NAME, Journal, read_journal
from moeconv.errors import MoeconvError
from moeconv.manifest.model import (
    MAX_PART_BYTES,
    PARTS_DIR,
    ROOT_NAME,
    FileEntry,
    Manifest,
    Part,
    Root,
    data_name,
)
from moeconv.manifest.part_reader import parse_parts
from moeconv.plan.onto_existing import PlacedHeader, plan_rereading
from moeconv.store.documents import file_digest
from moeconv.store.local import LocalFile, LocalStore

NOT_MADE = "moeconv did not make it"
_UNKNOWN = "it is newer than the manifest, which has no digests of it; `verify --fill` adds them"


class Identity(NamedTuple):
    """The facts of a file that show whether it is still the same and unchanged."""

    device: int
    inode: int
    size: int
    mtime_ns: int
    ctime_ns: int | None  # None where it has several names: removing one changes it for all

    def is_of(self, facts: os.stat_result) -> bool:
        """Return whether these facts are of the same, unchanged file."""
        now = identity_of(facts)
        return now[:-1] == self[:-1] and self.ctime_ns in (None, facts.st_ctime_ns)


def identity_of(facts: os.stat_result) -> Identity:
    """Return the identity for the result of `lstat`."""
    ctime_ns = facts.st_ctime_ns if facts.st_nlink == 1 else None
    return Identity(facts.st_dev, facts.st_ino, facts.st_size, facts.st_mtime_ns, ctime_ns)


@dataclass(frozen=True, slots=True)
class OutputInventory:
    """The files and folders of an output that are moeconv's, and why the others are not.

    path: of the output. folders: parents first. foreign: reason by relative path, folders end in
    `/`; changed files come first. trusted: data files of which size, header and times were
    compared, but not the tensors' bytes; compared: data files whose tensors were read, too.
    """

    path: Path
    files: dict[str, Identity] = field(default_factory=dict)
    folders: tuple[str, ...] = ()
    foreign: dict[str, str] = field(default_factory=dict)
    trusted: tuple[str, ...] = ()
    compared: tuple[str, ...] = ()

    @property
    def notes(self) -> tuple[str, ...]:
        """Notes on which data files were read before the output was removed, and which were not."""
        out = []
        if self.trusted:
            count = counted(len(self.trusted), "data file")
            what = "size, header and times were compared, not the tensors' bytes"
            out.append(f"old output, {count}: {what}")
        if self.compared:
            count = counted(len(self.compared), "data file")
            out.append(f"old output: {count} not older than its documents, so read and compared")
        return tuple(out)


@dataclass(slots=True)
class _Listing:
    """Everything below a directory, by relative path, links not followed."""

    facts: dict[str, os.stat_result] = field(default_factory=dict)
    folders: list[str] = field(default_factory=list)
    unread: dict[str, str] = field(default_factory=dict)

    def regular(self, name: str) -> os.stat_result | None:
        """The facts of a regular file; None for everything else."""
        facts = self.facts.get(name)
        return facts if facts is not None and stat.S_ISREG(facts.st_mode) else None


def _listed(out: Path) -> _Listing:
    """List a directory. Raises OSError if `out` itself cannot be read."""
    found, waiting = _Listing(), [""]
    while waiting:
        below = waiting.pop()
        try:
            with os.scandir(out / below) as listed:
                names = sorted(f"{below}/{e.name}" if below else e.name for e in listed)
            for name in names:
                facts = (out / name).lstat()
                if stat.S_ISDIR(facts.st_mode):
                    found.folders.append(name)
                    waiting.append(name)
                else:
                    found.facts[name] = facts
        except OSError as problem:
            if not below:
                raise
            found.unread[below] = f"it cannot be listed: {problem.strerror}"
    found.folders.sort()
    return found


def take_inventory(out: Path, limits: Limits) -> OutputInventory:
    """Compare everything in OUT with its manifest, or with its journal if it is unfinished.

    All bytes of documents and sidecars are compared; of data files size, header and times, and the
    digests of their tensors if the times show that they may have been written to.
    Raises OSError, and MemoryShort from reading tensors.
    """
    there = _listed(out)
    if ROOT_NAME in there.facts:
        claims = _of_output(out, there, limits)
    else:
        claims = _of_run(there, read_journal(out) if there.regular(JOURNAL_NAME) else None)
    reasons = claims.reasons
    foreign = dict(there.unread)
    files = {}
    for name, facts in there.facts.items():
        reason = reasons.get(name, NOT_MADE) if name in reasons or not _passing(name) else None
        if reason is None and not stat.S_ISREG(facts.st_mode):
            reason = "it is not a regular file"
        if reason is None:
            files[name] = identity_of(facts)
        else:
            foreign[name] = reason
    ours = {PARTS_DIR, *(f for name in reasons for f in _above(name))}
    holding = {f for name in (*there.facts, *there.folders) for f in _above(name)}
    for folder in there.folders:
        if folder not in ours and folder not in holding and folder not in foreign:
            foreign[folder] = NOT_MADE
    return OutputInventory(
        out,
        files=files,
        folders=tuple(f for f in there.folders if f in ours),
        foreign={
            f"{name}/" if name in there.folders else name: why
            for name, why in sorted(foreign.items(), key=lambda item: (item[1] == NOT_MADE, item))
        },
        trusted=claims.trusted,
        compared=claims.compared,
    )


def _above(name: str) -> Iterator[str]:
    """The folders that a relative path leads through."""
    while "/" in name:
        name = name.rpartition("/")[0]
        yield name


def _passing(name: str) -> bool:
    """Whether it is a file that exists only while a run is writing."""
    hidden = name.startswith(f"{PARTS_DIR}/.") and name.count("/") == 1
    return name == JOURNAL_NAME or (hidden and name.endswith(PARTIAL_SUFFIX))


@dataclass(slots=True)
class _Claims:
    """For each name that moeconv gave, whether it is there or not, what it claims.

    reasons: why the file there is not moeconv's own; None where it is.
    """

    reasons: dict[str, str | None] = field(default_factory=dict)
    trusted: tuple[str, ...] = ()
    compared: tuple[str, ...] = ()


# --- an unfinished output ----------------------------------------------------------------------
def _of_run(there: _Listing, journal: Journal | None) -> _Claims:
    """Read which files an unfinished run made from its journal."""
    if journal is None:
        return _Claims()
    facts = ((name, there.facts.get(name)) for name in journal.names)
    return _Claims({n: unfinished_file_problem(journal, n, f) if f else None for n, f in facts})


def unfinished_file_problem(journal: Journal, name: str, facts: os.stat_result) -> str | None:
    """Return why a file is not as the journal's run left it; None if it is."""
    noted = journal.made.get(name)
    if noted is None:
        return "the unfinished run had not made it yet"
    if not stat.S_ISREG(facts.st_mode) or (facts.st_size, facts.st_mtime_ns) != noted:
        return "it was changed after the unfinished run made it"
    return None


# --- a finished output --------------------------------------------------------------------------
def _of_output(out: Path, there: _Listing, limits: Limits) -> _Claims:
    root_facts = there.regular(ROOT_NAME)
    try:
        root = read_root(LocalStore(out))
    except MoeconvError as problem:
        # without the root it is not known which files are ours
        return _Claims({ROOT_NAME: f"it cannot be relied on: {problem.message}"})
    if root_facts is None:
        return _Claims({ROOT_NAME: "it is not a regular file"})
    claims = _Claims({ROOT_NAME: None})
    claims.reasons[FILLED_ROOT] = None
    others = (root.origin, *root.sidecars, *([root.index] if root.index else []))
    for entry in others:
        claims.reasons[entry.name] = _file_problem(out, entry, there)
    later = [root_facts, *(f for e in others if (f := there.regular(e.name)) is not None)]
    parts: list[Part] = []
    for entry in root.parts:
        claims.reasons[filled_name(entry.name)] = None
        claims.reasons[entry.name], found = _part(out, root, entry, there)
        parts += found
        if not found and root.ep_size is None:
            claims.reasons[data_name(entry.name)] = _without_part(
                there.regular(data_name(entry.name)), root_facts
            )
    suspects: list[Part] = []
    for part in (p for p in parts if p.file):
        facts = there.regular(part.file)
        reason = claims.reasons[part.file] = _data_problem(out, part, facts)
        if facts is None or facts.st_size == 0 or reason is not None:
            continue
        if _written_since(facts, root_facts, same_moment=_has_digests(part)) or (
            _has_digests(part) and _out_of_order(facts, later)
        ):
            suspects.append(part)
        else:
            claims.trusted += (part.file,)
    claims.reasons |= _read_and_compare(out, root, suspects, limits)
    claims.compared = tuple(p.file for p in suspects)
    return claims


def _file_problem(out: Path, entry: FileEntry, there: _Listing) -> str | None:
    """Return why a file is not the one that the root names; None if it is, or is missing."""
    facts = there.regular(entry.name)
    if facts is None:
        return None if entry.name not in there.facts else "it is not a regular file"
    if facts.st_size == 0:
        return None  # an empty file has nothing to lose
    if facts.st_size != entry.size:
        return "its size is not the one it was written with"
    try:
        same = file_digest(out / entry.name, name=entry.name) == entry.digest
    except MoeconvError as problem:
        return f"it cannot be compared: {problem.cause}"
    return None if same else "its bytes are not those that were written"


def _part(
    out: Path, root: Root, entry: FileEntry, there: _Listing
) -> tuple[str | None, tuple[Part, ...]]:
    """Return why a part is not moeconv's, if so, and its contents as far as they can be read."""
    reason = _file_problem(out, entry, there)
    try:
        raw = read_entry(LocalStore(out), entry, limit=MAX_PART_BYTES)
        parts = parse_parts(raw, root, where=entry.name)
    except (MoeconvError, OSError):
        return reason, ()
    if reason is not None and there.regular(entry.name) and there.regular(filled_name(entry.name)):
        # digests were being filled in: the old part differs from the new one in nothing else
        try:
            old = read_named(LocalStore(out), entry.name, limit=MAX_PART_BYTES)
            # the root was like this before
            older = parse_parts(old, replace(root, unread=True), where=entry.name)
        except MoeconvError:
            return reason, parts
        if [_bare(p) for p in older] == [_bare(p) for p in parts]:
            reason = None
    return reason, parts


def _bare(part: Part) -> Part:
    return replace(part, tensors=tuple(replace(t, digests=()) for t in part.tensors))


def _without_part(facts: os.stat_result | None, root: os.stat_result) -> str | None:
    """Return why a data file whose part is missing is not moeconv's, by its times alone."""
    if facts is None or not _written_since(facts, root, same_moment=False):
        return None
    return "it was written to after the output was made, and its part is missing"


def _data_problem(out: Path, part: Part, facts: os.stat_result | None) -> str | None:
    if facts is None or facts.st_size == 0:
        return None
    if facts.st_size != part.size:
        return "its size is not the one it was written with"
    try:
        header = read_header(LocalFile.at(out / part.file, name=part.file), number=0)
    except MoeconvError as problem:
        return f"its header cannot be compared: {problem.cause}"
    if len(header.raw) != part.header_size or digest(header.raw) != part.header_digest:
        return "its header is not the one that was written"
    return None


def _has_digests(part: Part) -> bool:
    return all(t.digests for t in part.tensors)


def _written_since(facts: os.stat_result, root: os.stat_result, *, same_moment: bool) -> bool:
    """Return whether a data file may have been written to after the root, which is written last.

    same_moment: whether equal times count, too: clocks of file systems tick slowly.
    """
    pairs = ((facts.st_mtime_ns, root.st_mtime_ns), (facts.st_ctime_ns, root.st_ctime_ns))
    return any(own > last or (same_moment and own == last) for own, last in pairs)


def _out_of_order(facts: os.stat_result, later: list[os.stat_result]) -> bool:
    """Return whether a data file is newer than a file that is written after all data files.

    Then the files were copied or touched one by one since, and the times no longer show an edit
    before that, although the root may be the newest of all.
    """
    return any(
        facts.st_mtime_ns > f.st_mtime_ns or facts.st_ctime_ns > f.st_ctime_ns for f in later
    )


def _read_and_compare(
    out: Path, root: Root, suspects: list[Part], limits: Limits
) -> dict[str, str | None]:
    """Compare the tensors of data files with the digests that their parts record."""
    reasons: dict[str, str | None] = {}
    known = []
    for part in suspects:
        if _has_digests(part):
            known.append(part)
        else:
            reasons[part.file] = _UNKNOWN
    there: list[DataFile] = []
    try:
        for number, part in enumerate(known):
            file = LocalFile.at(out / part.file, name=part.file)
            there.append(DataFile(file, read_header(file, number=number)))
        headers = tuple(PlacedHeader(f.name, f.size, f.header) for f in there)
        planned = plan_rereading(Manifest(root, tuple(known)), headers)
        found = digests_of(planned, tuple(there), limits=limits, progress=lambda _: None)
    except (MoeconvError, LookupError, ValueError) as problem:  # documents that were forged
        cause = (
            problem.message if isinstance(problem, MoeconvError) else "its part does not match it"
        )
        return reasons | {p.file: f"it cannot be compared: {cause}" for p in known}
    fresh = {f.name: _digests(part_of(f, found[f.name])) for f in planned}
    for part in known:
        same = fresh[part.file] == _digests(part)
        reasons[part.file] = None if same else "its tensors are not those that were written"
    return reasons


def _digests(part: Part) -> dict[str, tuple[str, ...]]:
    return {t.name: t.digests for t in part.tensors}
