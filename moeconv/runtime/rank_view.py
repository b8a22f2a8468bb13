"""One rank's view of an output: its tensors and experts, and where their bytes are.

Under a new placement, some of them are in other ranks' files.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import Self

from moeconv.errors import GeometryMismatch, MissingShard, Unsupported, UsageProblem, quoted
from moeconv.manifest.model import Run, part_names
from moeconv.placement.model import Given, by_stack, refuse_misfits, row_problems
from moeconv.runtime.byte_runs import LocalTensor, equal_part, join_runs
from moeconv.runtime.files import DataFile
from moeconv.runtime.open import (
    ComponentKey,
    Files,
    LocatedTensor,
    OpenOutput,
    component_key,
    rank_tensors,
)
from moeconv.runtime.validate import Rows, is_stacked, manifest_error
from moeconv.runtime.verify import check_digests, single_slot


@dataclass(frozen=True, slots=True, eq=False, repr=False)
class RankView:
    """What one rank has of an output: its tensors, and where their bytes are. Opens no file.

    verify: whether every byte that is read through it was held against the manifest before.
    """

    output: OpenOutput
    common: tuple[LocatedTensor, ...]
    own: tuple[LocatedTensor, ...]
    rows: Rows
    tensors: Mapping[str, LocalTensor]
    files: Mapping[int, DataFile]
    verify: bool = False

    def __repr__(self) -> str:
        size = f"{len(self.tensors):,} tensors"
        rank = f"{type(self).__name__} {self.ep_rank} of {self.ep_size}"
        return f"<{rank}: {size}, {str(self.output.path)!r}>"

    @property
    def ep_rank(self) -> int:
        """Which rank it is, from 0."""
        return self.output.rank

    @property
    def ep_size(self) -> int:
        """How many ranks share the experts."""
        return self.output.ep_size

    @property
    def names(self) -> tuple[str, ...]:
        """The names of what `load()` gives."""
        return tuple(self.tensors)

    @property
    def stacks(self) -> tuple[str, ...]:
        """The names of the expert stacks."""
        return tuple(s.name for s in self.output.root.stacks)

    @property
    def placement(self) -> dict[str, tuple[int, ...]]:
        """The expert in each slot, [P], of each stack that the ranks share."""
        return {self.stacks[number]: row for number, row in self.rows.items()}

    def logical_experts(self, stack: str) -> tuple[int, ...]:
        """The expert in each of this rank's slots: [S]; all of a stack that every rank has whole.

        Raises UsageProblem.
        """
        if stack not in self.stacks:
            raise UsageProblem(
                f"{quoted(stack)} is not a stack of the output", fix="see `Shard.stacks`"
            )
        number = self.stacks.index(stack)
        row = self.rows.get(number)
        if row is None:
            return tuple(range(self.output.root.stacks[number].experts))
        share = len(row) // self.ep_size
        return row[self.ep_rank * share : (self.ep_rank + 1) * share]

    def check_placement(self, placement: Given) -> None:
        """Hold a caller's placement against the output's. Raises GeometryMismatch, BadPlacement."""
        have = self.placement
        other = []
        for name, row in by_stack(self.stacks, placement).items():
            experts = self.logical_experts(name)
            # a stack that is not shared is in the trivial placement of one rank
            if row != have.get(name, experts if self.ep_size == 1 else None):
                other.append(name)
        if other:
            raise GeometryMismatch(
                f"the output's placement differs from yours, in {len(other):,} stack(s)",
                at=quoted(str(self.output.path)),
                cause=f"{quoted(other[0])} is one of them",
                fix="shard again with your placement, or take the output's from `Shard.placement`",
            )

    @property
    def weights(self) -> object:
        """Identifies the weights: the fingerprint, or else the identity of the files."""
        if (fingerprint := self.output.root.fingerprint) is not None:
            return fingerprint
        used = {run.file for s in (*self.common, *self.own) for run in s.runs}
        return frozenset(self.files[number].identity for number in used)

    def verified(self) -> Self:
        """The same, its bytes held against their digests. Raises what `open` raises for it."""
        if self.verify:
            return self
        check_digests((*self.common, *self.own), self.output.root.stacks, self.files)
        return replace(self, verify=True)

    def rearranged(self, placement: Given) -> Self:
        """The same rank under a new placement, with the bytes of the experts that it moves here.

        Raises GeometryMismatch, BadPlacement, MissingShard, Damaged, SourceChanged, DigestsMissing.
        """
        rows = new_rows(self.output, self.rows, placement)
        catalog = ExpertCatalog(self.output, dict(self.files))
        own = relocate(catalog, self.own, rows)
        tensors = rank_tensors(self.output, self.common, own, rows)
        if self.verify:
            check_digests(catalog.fetched.values(), self.output.root.stacks, catalog.files)
        # `own` stays as the files have it: the next placement is found from there too
        return replace(self, rows=rows, tensors=tensors, files=catalog.files)


# --- a new placement --------------------------------------------------------------------------
def new_rows(output: OpenOutput, rows: Rows, placement: Given) -> dict[int, tuple[int, ...]]:
    """All rows under a new placement. Raises GeometryMismatch, BadPlacement."""
    names = tuple(s.name for s in output.root.stacks)
    out: dict[int, tuple[int, ...]] = dict(rows)
    problems: list[str] = []
    for name, row in by_stack(names, placement).items():
        number = names.index(name)
        if number not in rows or len(row) != len(rows[number]):
            have = (
                f"{len(rows[number])} slots"
                if number in rows
                else "no slots: every rank has all of it"
            )
            raise GeometryMismatch(
                f"{quoted(name)} cannot have {len(row)} slots",
                at=quoted(str(output.path)),
                cause=f"in the output it has {have}",
                fix="shard again for this number of slots",
            )
        experts = output.root.stacks[number].experts
        problems += row_problems(
            row,
            experts=experts,
            ep_size=output.ep_size,
            where=quoted(name),
            allow_duplicates=True,  # a rank may fill two slots alike
        )
        out[number] = row
    refuse_misfits(problems)
    return out


def changed_slots(
    output: OpenOutput, old: Rows, new: Rows
) -> dict[str, tuple[tuple[int, int], ...]]:
    """(local slot, expert) of this rank's slots that have another expert now, by stack."""
    out = {}
    for number, row in new.items():
        share = len(row) // output.ep_size
        mine = range(output.rank * share, (output.rank + 1) * share)
        found = tuple((p - mine.start, row[p]) for p in mine if row[p] != old[number][p])
        if found:
            out[output.root.stacks[number].name] = found
    return out


@dataclass(slots=True)
class ExpertCatalog:
    """Where the bytes of each expert are, by the files' own placement; other ranks' on demand.

    fetched: what was asked for and is other ranks', each slot as a tensor of its own.
    """

    output: OpenOutput
    files: Files
    fetched: dict[tuple[ComponentKey, int], LocatedTensor] = field(default_factory=dict)
    _found: dict[tuple[ComponentKey, int], tuple[LocatedTensor, int, int]] = field(
        default_factory=dict
    )
    _ranks: set[int] = field(default_factory=set)

    def add(self, rank: int, several: Iterable[LocatedTensor]) -> None:
        """Note what a rank's part holds; what was noted before stays."""
        self._ranks.add(rank)
        for stored in several:
            expert = stored.entry.expert
            if expert is None or expert.slots is None:
                continue
            count = len(expert.experts)
            if count > 1 and not is_stacked(expert):
                raise Unsupported(
                    f"{quoted(stored.entry.name)} cannot be moved slot by slot",
                    cause=f"its axes {quoted(expert.axes)} have no E, but it has {count} slots",
                    fix="shard again with the new placement",
                )
            for n, e in enumerate(expert.experts):
                self._found.setdefault((component_key(expert), e), (stored, n, rank))

    def runs(self, key: ComponentKey, expert: int, like: LocatedTensor) -> tuple[Run, ...]:
        """The bytes of an expert's tensor. Raises MissingShard, Damaged, BadManifest."""
        if (key, expert) not in self._found:
            row = self.output.rows[key[0]]
            share = len(row) // self.output.ep_size
            holders = {p // share for p, e in enumerate(row) if e == expert}
            self._read_one_of(sorted(holders - self._ranks))
        found = self._found.get((key, expert))
        if found is None:
            raise manifest_error(
                like.entry.name, f"expert {expert} has no matching tensor on another rank"
            )
        stored, number, rank = found
        count, here = (len(s.entry.expert.experts) if s.entry.expert else 1 for s in (like, stored))
        size = (like.entry.stop - like.entry.start) // count
        runs = equal_part(stored.runs, number, here)
        if stored.entry.dtype != like.entry.dtype or sum(r.nbytes for r in runs) != size:
            raise manifest_error(
                like.entry.name, f"expert {expert} has no matching tensor on another rank"
            )
        if rank != self.output.rank:
            self.fetched[key, expert] = single_slot(stored, number)
        return runs

    def _read_one_of(self, ranks: list[int]) -> None:
        """Read the first of several ranks whose files are there. Raises what the last one does."""
        names = {whose: name for name, whose in part_names(self.output.ep_size).items()}
        for rank in ranks:
            part = next(p for p in self.output.root.parts if p.name == names[rank])
            try:
                self.add(rank, self.output.read_part(part, self.files))
            except MissingShard:
                if rank == ranks[-1]:
                    raise
            else:
                return


def relocate(
    catalog: ExpertCatalog, own: Iterable[LocatedTensor], rows: Rows
) -> list[LocatedTensor]:
    """This rank's tensors with the bytes of the experts that `rows` puts into their slots."""
    own, output = tuple(own), catalog.output
    moving = [s for s in own if _experts(s, rows) != _experts(s, output.rows)]
    stacks = {s.entry.expert.stack for s in moving if s.entry.expert}
    catalog.add(output.rank, (s for s in own if s.entry.expert and s.entry.expert.stack in stacks))
    out = []
    for stored in own:
        expert, experts = stored.entry.expert, _experts(stored, rows)
        if expert is None or experts == _experts(stored, output.rows):
            out.append(stored)
            continue
        key = component_key(expert)
        runs = [run for e in experts for run in catalog.runs(key, e, stored)]
        out.append(LocatedTensor(stored.entry, join_runs(runs)))
    return out


def _experts(stored: LocatedTensor, rows: Mapping[int, tuple[int, ...]]) -> tuple[int, ...]:
    expert = stored.entry.expert
    return () if expert is None else rows[expert.stack][slice(*(expert.slots or (0, 0)))]
