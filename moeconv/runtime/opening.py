"""Opening a set: the root, this rank's part and the common one, and what their tensors are.

No other rank's documents are read, and nothing here grows with the number of the source's tensors.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from math import prod
from pathlib import Path
from typing import TypeAlias

from moeconv.checkpoint.dtypes import BITS
from moeconv.checkpoint.papers import read_entry, read_root
from moeconv.errors import BadManifest, DuplicateTensor, NotASet, Unfinished, quoted
from moeconv.manifest import (
    MAX_PART_BYTES,
    PARTS_DIR,
    ROOT_NAME,
    ExpertEntry,
    FileEntry,
    Part,
    Root,
    Run,
    TensorEntry,
    part_names,
)
from moeconv.manifestreader import parse_parts
from moeconv.runtime.files import DataFile, own_file, source_file
from moeconv.runtime.tensors import Held, LocalTensor, in_slot, joined

Rows: TypeAlias = Mapping[int, tuple[int, ...]]  # stack number -> [P], for stacks that ranks share
Key: TypeAlias = tuple[int, tuple[str, ...], str]  # stack number, projections, component
Files: TypeAlias = dict[int, DataFile]


@dataclass(frozen=True, slots=True)
class Stored:
    """A tensor of a part, and its bytes by the shard's file numbers."""

    entry: TensorEntry
    runs: tuple[Run, ...]


@dataclass(frozen=True, slots=True)
class Home:
    """A set on disk as one rank sees it. source: the directory of a virtual set's files."""

    path: Path
    root: Root
    source: Path | None
    rank: int

    @property
    def ep_size(self) -> int:
        """How many ranks share it; 1 for a whole set."""
        return self.root.ep_size or 1

    @property
    def rows(self) -> Rows:
        """The placement it was written in."""
        stacks = enumerate(self.root.stacks)
        return {n: s.physical_to_logical for n, s in stacks if s.physical_to_logical is not None}

    def read_part(self, entry: FileEntry, files: Files) -> tuple[Stored, ...]:
        """A part's tensors, after its files were found and checked; these are added to `files`.

        Raises MissingShard, Damaged, SourceChanged, BadManifest, UnsafePath.
        """
        raw = read_entry(self.path, entry, limit=MAX_PART_BYTES)
        out: list[Stored] = []
        for part in parse_parts(raw, self.root, where=entry.name):
            number = max(files, default=-1) + 1
            if part.file:
                files[number] = own_file(self.path, part)
            elif self.root.source is not None and self.source is not None:
                used = {r.file for t in part.tensors for r in t.runs} - files.keys()
                listed = self.root.source.files
                files |= {n: source_file(self.source, listed[n]) for n in sorted(used)}
            out += [_stored(tensor, part, number) for tensor in part.tensors]
        return tuple(out)


def find(path: Path, *, source: Path | None) -> tuple[Path, Root, Path | None]:
    """The root of a set. Raises NotASet, Unfinished, Damaged, BadManifest, UnsupportedVersion."""
    if not (path / ROOT_NAME).exists():
        if (path / PARTS_DIR).is_dir():
            raise Unfinished(
                f"{quoted(path.name)} is an unfinished output of moeconv",
                at=quoted(str(path)),
                cause=f"it has `{PARTS_DIR}/` but no `{ROOT_NAME}`, which is written last",
                fix="wait until it is written, or convert again",
            )
        raise NotASet(
            f"{quoted(path.name)} is no set of moeconv",
            at=quoted(str(path)),
            cause=f"it has no `{ROOT_NAME}`",
            fix="convert the checkpoint with `moeconv shard` or `moeconv fuse`",
        )
    root = read_root(path)
    if root.source is None:
        return path, root, None
    return path, root, source if source is not None else path / root.source.directory


def wanted_parts(root: Root, rank: int) -> tuple[FileEntry, ...]:
    """The parts that a rank needs: the common one and its own, or all of a whole set."""
    if root.ep_size is None:
        return root.parts
    whose = part_names(root.ep_size)
    return tuple(p for p in root.parts if whose[p.name] in (None, rank))


def _stored(entry: TensorEntry, part: Part, number: int) -> Stored:
    """Raises BadManifest where the bytes are not those of such a tensor."""
    bits = prod(entry.shape) * BITS.get(entry.dtype, 0)
    if entry.dtype not in BITS or bits != (entry.stop - entry.start) * 8:
        raise bad(entry.name, f"{entry.dtype} {list(entry.shape)} does not take its bytes")
    if not part.file:
        return Stored(entry, joined(entry.runs))
    if entry.start < part.header_size or entry.stop > part.size:
        raise bad(entry.name, f"its bytes lie outside the data of {quoted(part.file)}")
    return Stored(entry, joined([Run(number, entry.start, entry.stop - entry.start)]))


def bad(name: str, cause: str) -> BadManifest:
    """The error for a manifest that says something impossible of a tensor."""
    return BadManifest(
        f"the manifest is wrong about {quoted(name)}",
        at=quoted(name),
        cause=cause,
        fix="convert the checkpoint again; a manifest is never edited by hand",
    )


# --- what a rank has ---------------------------------------------------------------------------
def key_of(expert: ExpertEntry) -> Key:
    """Which of a stack's tensors it is, whatever its slots."""
    return expert.stack, expert.projections, expert.component


def is_stacked(expert: ExpertEntry) -> bool:
    """Whether experts lie along dimension 0. Raises BadManifest where along another."""
    axes = expert.axes.replace("(", " ").replace(")", " ").split()
    if "E" in axes[1:]:
        raise bad(f"stack {expert.stack}", f"axes {quoted(expert.axes)} have E inside")
    return axes[:1] == ["E"]


def is_global(stored: Stored, rows: Rows) -> bool:
    """Whether a common tensor is a small one of experts that ranks share."""
    expert = stored.entry.expert
    return expert is not None and expert.slots is None and expert.stack in rows


def plain(stored: Stored) -> LocalTensor:
    """A tensor that every rank has as it is stored."""
    entry = stored.entry
    digest = entry.digests[0] if entry.expert is None and entry.digests else None
    return LocalTensor(entry.name, entry.dtype, entry.shape, stored.runs, digest)


def rank_tensors(
    home: Home, common: Iterable[Stored], own: Iterable[Stored], rows: Rows
) -> dict[str, LocalTensor]:
    """All tensors of a rank by name. Raises BadManifest, DuplicateTensor."""
    out: list[LocalTensor] = []
    spans: dict[Key, list[tuple[int, int]]] = defaultdict(list)
    globals_: dict[Key, list[Stored]] = defaultdict(list)
    for stored in common:
        expert = stored.entry.expert
        if expert is not None and is_global(stored, rows):
            globals_[key_of(expert)].append(stored)
        else:
            out.append(plain(stored))
    for stored in own:
        expert = stored.entry.expert
        if expert is None or expert.slots is None:
            raise bad(stored.entry.name, "a rank's tensor must have slots")
        spans[key_of(expert)].append(expert.slots)
        out.append(_slot_tensor(home, stored, expert, rows))
    _check_slots(home, rows, spans)
    for several in globals_.values():
        out += gathered(home, several, rows)
    tensors = {tensor.name: tensor for tensor in out}
    if len(tensors) != len(out):
        name = Counter(t.name for t in out).most_common(1)[0][0]
        raise DuplicateTensor(
            f"{quoted(name)} is in this rank's files twice",
            at=quoted(name),
            cause="two parts of the set name it",
            fix="convert the checkpoint again",
        )
    return tensors


def _slot_tensor(home: Home, stored: Stored, expert: ExpertEntry, rows: Rows) -> LocalTensor:
    entry, row = stored.entry, rows[expert.stack]
    start, stop = expert.slots or (0, 0)
    first, stacked = home.rank * (len(row) // home.ep_size), is_stacked(expert)
    if stacked and (not entry.shape or entry.shape[0] % (stop - start)):
        raise bad(entry.name, f"{list(entry.shape)} is not {stop - start} slots")
    held = Held(expert.stack, start, stop, len(row), first, stacked)
    return LocalTensor(entry.name, entry.dtype, entry.shape, stored.runs, None, held)


def _check_slots(home: Home, rows: Rows, spans: Mapping[Key, list[tuple[int, int]]]) -> None:
    """Every slot of the rank once, by slot and never by counting names. Raises BadManifest."""
    for stack, row in rows.items():
        share = len(row) // home.ep_size
        wanted = home.rank * share
        name = home.root.stacks[stack].name
        found = [s for key, s in spans.items() if key[0] == stack]
        if not found:
            raise bad(name, f"rank {home.rank} has none of its tensors")
        for several in found:
            at = wanted
            for start, stop in sorted(several):
                if start != at:
                    raise bad(name, f"slot {min(at, start)} is there twice or not at all")
                at = stop
            if at != wanted + share:
                raise bad(name, f"slot {at} is missing")


def gathered(home: Home, several: list[Stored], rows: Rows) -> list[LocalTensor]:
    """The rank's share of small tensors that are kept for all experts, in slot order."""
    first = several[0].entry
    expert = first.expert
    if expert is None:
        return []
    row, number = rows[expert.stack], expert.stack
    share = len(row) // home.ep_size
    start = home.rank * share
    mine = row[start : start + share]
    experts = home.root.stacks[number].experts
    if len(several) == 1 and is_stacked(expert):
        if expert.experts != tuple(range(experts)) or sum(first.shape[:1]) % experts:
            raise bad(first.name, f"it must hold all {experts} experts in their order")
        runs = [run for e in mine for run in in_slot(several[0].runs, e, experts)]
        shape = (first.shape[0] // experts * share, *first.shape[1:])
        held = Held(number, start, start + share, len(row), start, stacked=True)
        return [LocalTensor(first.name, first.dtype, shape, joined(runs), None, held)]
    if len(expert.experts) > 1:
        return [plain(stored) for stored in several]  # one value for several experts
    by_expert = {s.entry.expert.experts[0]: s for s in several if s.entry.expert is not None}
    if absent := [e for e in mine if e not in by_expert]:
        raise bad(first.name, f"expert {absent[0]} has no such tensor")
    out = []
    for slot, e in enumerate(mine):
        entry, stored = by_expert[e].entry, by_expert[e]
        template = entry.expert.local if entry.expert is not None else None
        if template is None:
            raise bad(entry.name, "it lacks `local`, its name on a rank")
        held = Held(number, start + slot, start + slot + 1, len(row), start, stacked=False)
        tensor = replace(plain(stored), name=template.replace("{slot}", str(slot)), held=held)
        out.append(tensor)
    return out
