"""One rank's view of an output: its tensors and experts, and where their bytes are.

Under a new placement, some of them are in other ranks' files.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import Self

from moeconv.core.text import counted
from moeconv.errors import GeometryMismatch, MissingShard, Unsupported, UsageProblem, quoted
from moeconv.manifest.model import Run
from moeconv.placement.model import Given, by_stack, refuse_misfits, row_problems
from moeconv.runtime.byte_runs import ComponentKey, LocalTensor, component_key, join_runs
from moeconv.runtime.files import DataFile
from moeconv.runtime.open import Files, OpenOutput, rank_tensors, single_expert
from moeconv.runtime.validate import Rows, manifest_error
from moeconv.runtime.verify import check_digests


@dataclass(frozen=True, slots=True, eq=False, repr=False)
class RankView:
    """What one rank has of an output: its tensors, and where their bytes are. Opens no file.

    verify: whether every byte that is read through it was compared with the manifest before.
    """

    output: OpenOutput
    common: tuple[LocalTensor, ...]
    own: tuple[LocalTensor, ...]
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
        slots = self.output.slots_of(row)
        return row[slots.start : slots.stop]

    def check_placement(self, placement: Given) -> None:
        """Compare a caller's placement with the output's. Raises GeometryMismatch, BadPlacement."""
        have = self.placement
        other = []
        for name, row in by_stack(self.stacks, placement).items():
            experts = self.logical_experts(name)
            # a stack that is not shared is in the trivial placement of one rank
            if row != have.get(name, experts if self.ep_size == 1 else None):
                other.append(name)
        if other:
            raise GeometryMismatch(
                f"the output's placement differs from yours, in {counted(len(other), 'stack')}",
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
        """The same, its bytes compared with their digests. Raises what `open` raises for it."""
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
        slots = len(rows.get(number, ()))
        if len(row) != slots or not slots:
            have = f"{slots} slots" if slots else "no slots: every rank has all of it"
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
        mine = enumerate(output.slots_of(row))
        found = tuple((n, row[p]) for n, p in mine if row[p] != old[number][p])
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
    fetched: dict[tuple[ComponentKey, int], LocalTensor] = field(default_factory=dict)
    _found: dict[tuple[ComponentKey, int], tuple[LocalTensor, int, int]] = field(
        default_factory=dict
    )
    _ranks: set[int] = field(default_factory=set)

    def add(self, rank: int, several: Iterable[LocalTensor]) -> None:
        """Note what a rank's part holds; what was noted before stays."""
        self._ranks.add(rank)
        for tensor in several:
            expert, slot_range = tensor.entry.expert, tensor.slot_range
            if expert is None or slot_range is None:
                continue
            count = len(expert.experts)
            if count > 1 and not slot_range.stacked:
                raise Unsupported(
                    f"{quoted(tensor.name)} cannot be moved slot by slot",
                    cause=f"its axes {quoted(expert.axes)} have no E, but it has {count} slots",
                    fix="shard again with the new placement",
                )
            for n, e in enumerate(expert.experts):
                self._found.setdefault((component_key(expert), e), (tensor, n, rank))

    def runs(
        self, key: ComponentKey, expert: int, like: LocalTensor, nbytes: int
    ) -> tuple[Run, ...]:
        """The bytes of an expert's tensor of a size. Raises MissingShard, Damaged, BadManifest."""
        if (key, expert) not in self._found:
            row = self.output.rows[key[0]]
            share = len(row) // self.output.ep_size
            holders = {p // share for p, e in enumerate(row) if e == expert}
            self._read_one_of(sorted(holders - self._ranks))
        tensor, number, rank = self._found.get((key, expert), (None, 0, 0))
        one = None if tensor is None else single_expert(tensor, number)
        if one is None or (one.dtype, one.nbytes) != (like.dtype, nbytes):
            raise manifest_error(
                like.name, f"expert {expert} has no matching tensor on another rank"
            )
        if rank != self.output.rank:
            self.fetched[key, expert] = one
        return one.runs

    def _read_one_of(self, ranks: list[int]) -> None:
        """Read the first of several ranks whose files are there. Raises what the last one does."""
        for rank in ranks:
            (part,) = self.output.parts_of(rank)
            try:
                self.add(rank, self.output.read_part(part, self.files))
            except MissingShard:
                if rank == ranks[-1]:
                    raise
            else:
                return


def relocate(catalog: ExpertCatalog, own: Iterable[LocalTensor], rows: Rows) -> list[LocalTensor]:
    """This rank's tensors with the bytes of the experts that `rows` puts into their slots."""
    experts = [(tensor, _experts(tensor, rows)) for tensor in own]
    written = catalog.output.rows
    moving = [tensor for tensor, new in experts if new != _experts(tensor, written)]
    stacks = {tensor.slot_range.stack for tensor in moving if tensor.slot_range}
    catalog.add(
        catalog.output.rank,
        (t for t, _ in experts if t.slot_range and t.slot_range.stack in stacks),
    )
    out = []
    for tensor, new in experts:
        expert = tensor.entry.expert
        if expert is None or new == _experts(tensor, written):
            out.append(tensor)
            continue
        key, nbytes = component_key(expert), tensor.nbytes // len(new)
        runs = [run for e in new for run in catalog.runs(key, e, tensor, nbytes)]
        out.append(replace(tensor, runs=join_runs(runs)))
    return out


def _experts(tensor: LocalTensor, rows: Rows) -> tuple[int, ...]:
    slots = tensor.slot_range
    return () if slots is None else rows[slots.stack][slots.start : slots.stop]
