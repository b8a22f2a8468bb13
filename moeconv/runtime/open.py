"""Open an output: the root, this rank's part and the common one, and the tensors in them.

No other rank's documents are read; the cost does not depend on the size of the source.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterable
from dataclasses import dataclass, replace
from math import prod
from pathlib import Path
from typing import TypeAlias

from moeconv.checkpoint.output_files import read_entry, read_root
from moeconv.core.dtypes import BITS
from moeconv.core.names import slot_namer
from moeconv.errors import DuplicateTensor, NotAnOutput, Unfinished, quoted
from moeconv.manifest.model import (
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
from moeconv.manifest.part_reader import parse_parts
from moeconv.runtime.byte_runs import LocalTensor, SlotRange, equal_part, join_runs
from moeconv.runtime.files import DataFile, check_data_file, check_source_file
from moeconv.runtime.validate import Rows, is_stacked, manifest_error
from moeconv.store.local import LocalStore

ComponentKey: TypeAlias = tuple[int, tuple[str, ...], str]  # stack number, projections, component
Files: TypeAlias = dict[int, DataFile]


@dataclass(frozen=True, slots=True)
class LocatedTensor:
    """A tensor of a part, and its bytes by the shard's file numbers."""

    entry: TensorEntry
    runs: tuple[Run, ...]


@dataclass(frozen=True, slots=True)
class OpenOutput:
    """An output on disk, opened for one rank.

    source: the directory of a virtual output's files; copied: whether the caller named it.
    """

    path: Path
    root: Root
    source: Path | None
    rank: int
    copied: bool = False

    @property
    def ep_size(self) -> int:
        """How many ranks share it; 1 for a whole output."""
        return self.root.ep_size or 1

    @property
    def rows(self) -> Rows:
        """The placement it was written in."""
        stacks = enumerate(self.root.stacks)
        return {n: s.physical_to_logical for n, s in stacks if s.physical_to_logical is not None}

    def read_part(self, entry: FileEntry, files: Files) -> tuple[LocatedTensor, ...]:
        """A part's tensors, after its files were found and checked; these are added to `files`.

        Raises MissingShard, Damaged, SourceChanged, BadManifest, UnsafePath.
        """
        raw = read_entry(LocalStore(self.path), entry, limit=MAX_PART_BYTES)
        out: list[LocatedTensor] = []
        for part in parse_parts(raw, self.root, where=entry.name):
            known = (n for n, f in files.items() if f.name == part.file)
            number = next(known, max(files, default=-1) + 1)
            if part.file and number not in files:
                files[number] = check_data_file(self.path, part)
            elif not part.file and self.root.source is not None and self.source is not None:
                used = {r.file for t in part.tensors for r in t.runs} - files.keys()
                listed = self.root.source.files
                for n in sorted(used):
                    files[n] = check_source_file(self.source, listed[n], copied=self.copied)
            out += [_stored(tensor, part, number) for tensor in part.tensors]
        return tuple(out)


def find(path: Path, *, source: Path | None) -> tuple[Path, Root, Path | None]:
    """Read the root of an output.

    Raises NotAnOutput, Unfinished, Damaged, BadManifest, UnsupportedVersion.
    """
    if not (path / ROOT_NAME).exists():
        if (path / PARTS_DIR).is_dir():
            raise Unfinished(
                f"{quoted(path.name)} is an unfinished moeconv output",
                at=quoted(str(path)),
                cause=f"it has `{PARTS_DIR}/` but no `{ROOT_NAME}`, which is written last",
                fix="wait until it is written, or convert again",
            )
        raise NotAnOutput(
            f"{quoted(path.name)} is not a moeconv output",
            at=quoted(str(path)),
            cause=f"it has no `{ROOT_NAME}`",
            fix="convert the checkpoint with `moeconv shard` or `moeconv fuse`",
        )
    root = read_root(LocalStore(path))
    if root.source is None:
        return path, root, None
    return path, root, source if source is not None else path / root.source.directory


def parts_of_rank(root: Root, rank: int) -> tuple[FileEntry, ...]:
    """The parts that a rank needs: the common one and its own, or all of a whole output."""
    if root.ep_size is None:
        return root.parts
    whose = part_names(root.ep_size)
    return tuple(p for p in root.parts if whose[p.name] in (None, rank))


def _stored(entry: TensorEntry, part: Part, number: int) -> LocatedTensor:
    """Raises BadManifest where the bytes are not those of such a tensor."""
    bits = prod(entry.shape) * BITS.get(entry.dtype, 0)
    if entry.dtype not in BITS or bits != (entry.stop - entry.start) * 8:
        raise manifest_error(
            entry.name, f"{entry.dtype} {list(entry.shape)} does not match its size in bytes"
        )
    if not part.file:
        return LocatedTensor(entry, join_runs(entry.runs))
    return LocatedTensor(entry, join_runs([Run(number, entry.start, entry.stop - entry.start)]))


# --- what a rank has ---------------------------------------------------------------------------
def component_key(expert: ExpertEntry) -> ComponentKey:
    """Identify a tensor within its stack, regardless of slots."""
    return expert.stack, expert.projections, expert.component


def is_global(stored: LocatedTensor, rows: Rows) -> bool:
    """Whether a common tensor is a small one of experts that ranks share."""
    expert = stored.entry.expert
    return expert is not None and expert.slots is None and expert.stack in rows


def plain(stored: LocatedTensor) -> LocalTensor:
    """A tensor as it is stored, which every rank has in full."""
    entry = stored.entry
    digest = entry.digests[0] if entry.expert is None and entry.digests else None
    return LocalTensor(
        entry.name, entry.dtype, entry.shape, stored.runs, digest, meaning=_meaning(entry)
    )


def _meaning(entry: TensorEntry) -> tuple[object, ...]:
    return () if entry.expert is None else (*component_key(entry.expert), entry.expert.axes)


def rank_tensors(
    output: OpenOutput, common: Iterable[LocatedTensor], own: Iterable[LocatedTensor], rows: Rows
) -> dict[str, LocalTensor]:
    """All tensors of a rank by name. Raises BadManifest, DuplicateTensor."""
    out: list[LocalTensor] = []
    globals_: dict[ComponentKey, list[LocatedTensor]] = defaultdict(list)
    for stored in common:
        expert = stored.entry.expert
        if expert is not None and is_global(stored, rows):
            globals_[component_key(expert)].append(stored)
        else:
            out.append(plain(stored))
    for stored in own:
        expert = stored.entry.expert
        if expert is None or expert.slots is None:
            raise manifest_error(stored.entry.name, "a rank's tensor must have slots")
        out.append(_slot_tensor(output, stored, expert, rows))
    for several in globals_.values():
        out += rank_share(output, several, rows)
    tensors = {tensor.name: tensor for tensor in out}
    if len(tensors) != len(out):
        name = Counter(t.name for t in out).most_common(1)[0][0]
        raise DuplicateTensor(
            f"{quoted(name)} is in this rank's files twice",
            at=quoted(name),
            cause="two parts of the output name it",
            fix="convert the checkpoint again",
        )
    return tensors


def _slot_tensor(
    output: OpenOutput, stored: LocatedTensor, expert: ExpertEntry, rows: Rows
) -> LocalTensor:
    row = rows[expert.stack]
    start, stop = expert.slots or (0, 0)
    first, stacked = output.rank * (len(row) // output.ep_size), is_stacked(expert)
    slot_range = SlotRange(expert.stack, start, stop, len(row), first, stacked)
    return replace(plain(stored), slot_range=slot_range)


def rank_share(output: OpenOutput, several: list[LocatedTensor], rows: Rows) -> list[LocalTensor]:
    """The rank's share of small tensors that are kept for all experts, in slot order."""
    first = several[0].entry
    expert = first.expert
    if expert is None:
        return []
    row, number = rows[expert.stack], expert.stack
    share = len(row) // output.ep_size
    start = output.rank * share
    mine = row[start : start + share]
    if is_stacked(expert):
        runs = [run for e in mine for run in equal_part(several[0].runs, e, len(expert.experts))]
        slot_range = SlotRange(number, start, start + share, len(row), start, stacked=True)
        whole = plain(several[0])
        shape = (first.shape[0] // len(expert.experts) * share, *first.shape[1:])
        return [replace(whole, shape=shape, runs=join_runs(runs), slot_range=slot_range)]
    if expert.local is None:
        return [plain(stored) for stored in several]  # one value for several experts
    by_expert = {s.entry.expert.experts[0]: s for s in several if s.entry.expert is not None}
    out = []
    for slot, e in enumerate(mine):
        entry = by_expert[e].entry
        name = slot_namer((entry.expert.local if entry.expert else None) or "")
        if name is None:
            raise manifest_error(entry.name, "it lacks `local`, its name on a rank")
        slot_range = SlotRange(
            number, start + slot, start + slot + 1, len(row), start, stacked=False
        )
        out.append(replace(plain(by_expert[e]), name=name(slot), slot_range=slot_range))
    return out
