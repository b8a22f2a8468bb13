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

from moeconv.checkpoint.output_files import read_entry, read_root, unfinished
from moeconv.core.dtypes import BITS
from moeconv.core.names import slot_namer
from moeconv.errors import DuplicateTensor, NotAnOutput, quoted
from moeconv.manifest.model import (
    MAX_PART_BYTES,
    PARTS_DIR,
    ROOT_NAME,
    FileEntry,
    Part,
    Root,
    Run,
    TensorEntry,
    part_names,
)
from moeconv.manifest.part_reader import parse_parts
from moeconv.runtime.byte_runs import (
    ComponentKey,
    LocalTensor,
    SlotRange,
    component_key,
    equal_part,
    join_runs,
)
from moeconv.runtime.files import DataFile, open_data_file, open_source_file
from moeconv.runtime.validate import Rows, is_stacked, manifest_error
from moeconv.store.local import LocalStore

Files: TypeAlias = dict[int, DataFile]


@dataclass(frozen=True, slots=True)
class OpenOutput:
    """An output on disk, opened for one rank.

    data: where the bytes of its tensors are, for a virtual output the directory of its source.
    copied: whether the caller named that directory.
    """

    store: LocalStore
    data: LocalStore
    root: Root
    rank: int
    copied: bool

    @property
    def path(self) -> Path:
        """Its directory."""
        return self.store.root

    @property
    def ep_size(self) -> int:
        """How many ranks share it; 1 for a whole output."""
        return self.root.ep_size or 1

    @property
    def rows(self) -> Rows:
        """The placement it was written in."""
        stacks = enumerate(self.root.stacks)
        return {n: s.physical_to_logical for n, s in stacks if s.physical_to_logical is not None}

    def slots_of(self, row: tuple[int, ...]) -> range:
        """This rank's slots of a stack."""
        share = len(row) // self.ep_size
        return range(self.rank * share, (self.rank + 1) * share)

    def parts_of(self, *ranks: int | None) -> tuple[FileEntry, ...]:
        """The parts of some ranks (None: the common one); all of a whole output."""
        if self.root.ep_size is None:
            return self.root.parts
        whose = part_names(self.root.ep_size)
        return tuple(part for part in self.root.parts if whose[part.name] in ranks)

    def read_part(self, entry: FileEntry, files: Files) -> tuple[LocalTensor, ...]:
        """A part's tensors, after its files were found and checked; these are added to `files`.

        Raises MissingShard, Damaged, SourceChanged, BadManifest, UnsafePath.
        """
        raw = read_entry(self.store, entry, limit=MAX_PART_BYTES)
        out: list[LocalTensor] = []
        for part in parse_parts(raw, self.root, where=entry.name):
            known = (n for n, f in files.items() if f.name == part.file)
            number = next(known, max(files, default=-1) + 1)
            if part.file and number not in files:
                files[number] = open_data_file(self.data, part)
            elif self.root.source is not None:
                used = {r.file for t in part.tensors for r in t.runs} - files.keys()
                for n in sorted(used):
                    source = self.root.source.files[n]
                    files[n] = open_source_file(self.data, source, copied=self.copied)
            out += [self._tensor(tensor, part, number) for tensor in part.tensors]
        return tuple(out)

    def _tensor(self, entry: TensorEntry, part: Part, number: int) -> LocalTensor:
        """Raises BadManifest where the bytes are not those of such a tensor."""
        bits = prod(entry.shape) * BITS.get(entry.dtype, 0)
        if entry.dtype not in BITS or bits != (entry.stop - entry.start) * 8:
            raise manifest_error(
                entry.name, f"{entry.dtype} {list(entry.shape)} does not match its size in bytes"
            )
        runs = (Run(number, entry.start, entry.stop - entry.start),) if part.file else entry.runs
        slot_range, expert = None, entry.expert
        if expert is not None and expert.slots is not None:
            row = self.root.stacks[expert.stack].physical_to_logical or ()
            start = self.slots_of(row).start
            slot_range = SlotRange(expert.stack, *expert.slots, len(row), start, is_stacked(expert))
        return LocalTensor(entry, join_runs(runs), slot_range)


def open_for_rank(path: Path, *, source: Path | None, rank: int) -> OpenOutput:
    """Read the root of an output. source: where the files of a virtual one are, if elsewhere.

    Raises NotAnOutput, Unfinished, Damaged, BadManifest, UnsupportedVersion.
    """
    if not (path / ROOT_NAME).exists():
        if (path / PARTS_DIR).is_dir():
            raise unfinished(str(path))
        raise NotAnOutput(
            f"{quoted(path.name)} is not a moeconv output",
            at=quoted(str(path)),
            cause=f"it has no `{ROOT_NAME}`",
            fix="convert the checkpoint with `moeconv shard` or `moeconv fuse`",
        )
    store = LocalStore(path)
    root = read_root(store)
    data = store
    if root.source is not None:
        data = LocalStore(path / root.source.directory if source is None else source)
    return OpenOutput(store, data, root, rank, copied=source is not None)


# --- what a rank has ---------------------------------------------------------------------------
def is_global(tensor: LocalTensor, rows: Rows) -> bool:
    """Whether a common tensor is a small one of experts that ranks share."""
    expert = tensor.entry.expert
    return expert is not None and expert.slots is None and expert.stack in rows


def single_expert(tensor: LocalTensor, number: int) -> LocalTensor:
    """The expert at a position of a stacked tensor, with its digests, as a tensor of its own."""
    entry, expert = tensor.entry, tensor.entry.expert
    if expert is None or len(expert.experts) == 1:
        return tensor
    count, units = len(expert.experts), len(expert.projections)
    digests = entry.digests[number * units : (number + 1) * units]
    alone = replace(
        entry,
        shape=(entry.shape[0] // count, *entry.shape[1:]),
        digests=digests,
        expert=replace(expert, experts=(expert.experts[number],)),
    )
    return LocalTensor(alone, equal_part(tensor.runs, number, count))


def rank_tensors(
    output: OpenOutput, common: Iterable[LocalTensor], own: Iterable[LocalTensor], rows: Rows
) -> dict[str, LocalTensor]:
    """All tensors of a rank by name. Raises BadManifest, DuplicateTensor."""
    out: list[LocalTensor] = []
    globals_: dict[ComponentKey, list[LocalTensor]] = defaultdict(list)
    for tensor in common:
        expert = tensor.entry.expert
        if expert is not None and is_global(tensor, rows):
            globals_[component_key(expert)].append(tensor)
        else:
            out.append(tensor)
    out += own
    for (stack, *_), several in globals_.items():
        out += _rank_share(output, several, stack, rows[stack])
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


def _rank_share(
    output: OpenOutput, several: list[LocalTensor], stack: int, row: tuple[int, ...]
) -> list[LocalTensor]:
    """The rank's share of small tensors that are kept for all experts, in slot order."""
    slots = output.slots_of(row)
    mine = row[slots.start : slots.stop]
    by_expert = {e: t for t in several if t.entry.expert for e in t.entry.expert.experts}
    first = several[0]
    if first.entry.expert is not None and is_stacked(first.entry.expert):
        count = len(by_expert)
        runs = [run for e in mine for run in equal_part(first.runs, e, count)]
        shape = (first.shape[0] // count * len(mine), *first.shape[1:])
        slot_range = SlotRange(stack, slots.start, slots.stop, len(row), slots.start, stacked=True)
        return [LocalTensor(replace(first.entry, shape=shape), join_runs(runs), slot_range)]
    out = []
    for number, (slot, e) in enumerate(zip(slots, mine, strict=True)):
        tensor = by_expert[e]
        name = slot_namer((tensor.entry.expert and tensor.entry.expert.local) or "")
        if name is None:
            return several  # one value for several experts
        slot_range = SlotRange(stack, slot, slot + 1, len(row), slots.start, stacked=False)
        out.append(
            replace(tensor, entry=replace(tensor.entry, name=name(number)), slot_range=slot_range)
        )
    return out
