"""Where the bytes of each expert are, in this rank's files and in others', for a new placement."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

from moeconv.errors import GeometryMismatch, MissingShard, Unsupported, quoted
from moeconv.manifest.model import Run, part_names
from moeconv.placement.model import Given, by_stack, refuse_misfits, row_problems
from moeconv.runtime.byte_runs import equal_part, join_runs
from moeconv.runtime.open import ComponentKey, Files, LocatedTensor, OpenOutput, component_key
from moeconv.runtime.validate import Rows, is_stacked, manifest_error
from moeconv.runtime.verify import single_slot


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
