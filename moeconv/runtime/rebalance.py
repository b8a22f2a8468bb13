"""A new placement of the same slots: which slots change, and where their bytes are."""

from __future__ import annotations

import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

import torch

from moeconv.errors import DoesNotFit, GeometryMismatch, MissingShard, Unsupported, quoted
from moeconv.manifest.model import Run, part_names
from moeconv.placement.model import Given, by_stack, refuse_misfits, row_problems
from moeconv.runtime.bind import Fit, Rename, fit
from moeconv.runtime.byte_runs import LocalTensor, cut, in_slot, joined
from moeconv.runtime.open import Files, Home, Key, Stored, key_of
from moeconv.runtime.slot_records import follow, to_fill
from moeconv.runtime.transfer import loaded
from moeconv.runtime.updater import Report, Updater
from moeconv.runtime.validate import Rows, bad, is_stacked
from moeconv.runtime.verify import in_slot_alone

if TYPE_CHECKING:
    from moeconv.runtime.shard import Shard


@dataclass(frozen=True, slots=True, eq=False, repr=False)
class Moves:
    """What a new placement changes on one rank. changed: (local slot, expert) by stack.

    `changed` is counted from the placement of the shard whose `replace` made it. shard: the rank
    under the new placement; what it lacks comes out of other ranks' files. named: the stacks that
    the new placement names.
    """

    shard: Shard
    changed: dict[str, tuple[tuple[int, int], ...]]
    named: frozenset[str]

    def _touched(self) -> dict[LocalTensor, tuple[int, ...]]:
        number = {name: n for n, name in enumerate(self.shard.stacks)}
        slots = {number[s]: {slot for slot, _ in pairs} for s, pairs in self.changed.items()}
        out = {}
        for tensor in self.shard.tensors.values():
            held = tensor.held
            mine = slots.get(held.stack, set()) & set(held.local) if held else set()
            if mine:
                out[tensor] = tuple(sorted(mine))
        return out

    def load(
        self, device: torch.device | str | None = None, *, copy: bool = False
    ) -> dict[str, tuple[tuple[int, ...], torch.Tensor]]:
        """The slots in `changed` only: {name: (local slots, their values in that order)}.

        Where a layout names each slot, the tensor is that of the one slot. copy: as in
        `Shard.load`. Nothing is known here of the model that they are for: call `replace` of the
        shard that it holds.
        Raises SourceChanged, IoFailed, NoTorchDtype.

        >>> moves = shard.replace({"model.layers.0.mlp.experts": (2, 0, 3, 4, 1, 0)})
        >>> slots, values = moves.load()["model.layers.0.mlp.experts.down_proj"]
        >>> slots, values.shape
        ((2,), torch.Size([1, 8, 4]))
        """
        parts = {t.name: (slots, _slots_of(t, slots)) for t, slots in self._touched().items()}
        values = loaded((part for _, part in parts.values()), self.shard.files, device, copy=copy)
        return {name: (slots, values[name]) for name, (slots, _) in parts.items()}

    def load_into(
        self,
        model: torch.nn.Module,
        *,
        rename: Rename = None,
        ignore: Iterable[str] = (),
        cast: bool = False,
    ) -> Report:
        """Read into a model the slots whose expert changes, nothing else.

        Which experts the model holds is noted at every load (`load_into`, `Updater.load`): what
        differs from that is read, whatever placement this one was made from. All slots of the
        named stacks are read where there is no such note, or the memory was replaced or written
        to since. Options are those of `Shard.load_into`; the model may have other tensors.

        Raises DoesNotFit (a load into the model ended early, among others) and GeometryMismatch
        (the model holds another set's weights, or a stack that is not named in another placement)
        before the first byte is written, SourceChanged, IoFailed.
        """
        began, shard = time.perf_counter(), self.shard
        slots = {tensor.name: tensor for tensor in shard.tensors.values() if tensor.held}
        needed = {tensor.name for tensor in self._touched()}
        with torch.no_grad():
            fitted = fit(model, slots, rename=rename, ignore=ignore, cast=cast, needed=needed)
            pairs = [(f.target, held) for f in fitted.filled if (held := slots[f.source].held)]
            _refuse_untied(fitted, slots, shard)
            wanted = to_fill(pairs, shard, self.named)
        items = {
            f.target: f.only(wanted[f.target], slots[f.source])
            for f in fitted.filled
            if f.target in wanted
        }
        twins = tuple((items[f.target], n) for f, n in fitted.twins if f.target in items)
        fitted = replace(fitted, filled=tuple(items.values()), twins=twins)
        report = Updater(shard, fitted, None).write(shard, began)
        follow(pairs, shard, self.named)
        return report


def _refuse_untied(fitted: Fit, slots: Mapping[str, LocalTensor], shard: Shard) -> None:
    """Raise DoesNotFit where one memory would have to hold different experts for two stacks."""

    def experts(name: str) -> tuple[int, ...]:
        held = slots[name].held
        return shard.rows[held.stack][held.start : held.stop] if held else ()

    for item, other in fitted.twins:
        if experts(item.source) != experts(other):
            raise DoesNotFit(
                f"the model ties {quoted(item.source)} and {quoted(other)}",
                at=quoted(item.target.names[0]),
                cause="the new placement gives their slots different experts",
                fix="give both stacks the same placement, or untie them in the model",
            )


def _slots_of(tensor: LocalTensor, slots: Sequence[int]) -> LocalTensor:
    held = tensor.held
    if held is None or not held.stacked:
        return tensor
    count = len(held.local)
    size, rows = tensor.nbytes // count, tensor.shape[0] // count
    at = [n - held.local.start for n in slots]
    runs = cut(tensor.runs, [(n * size, (n + 1) * size) for n in at])
    return LocalTensor(tensor.name, tensor.dtype, (rows * len(at), *tensor.shape[1:]), runs)


# --- where the bytes are -----------------------------------------------------------------------
def new_rows(home: Home, rows: Rows, placement: Given) -> dict[int, tuple[int, ...]]:
    """All rows under a new placement. Raises GeometryMismatch, BadPlacement."""
    names = tuple(s.name for s in home.root.stacks)
    out: dict[int, tuple[int, ...]] = dict(rows)
    problems: list[str] = []
    for name, row in by_stack(names, placement).items():
        number = names.index(name)
        if number not in rows or len(row) != len(rows[number]):
            have = (
                f"{len(rows[number])} slots" if number in rows else "no slots, each rank all of it"
            )
            raise GeometryMismatch(
                f"{quoted(name)} cannot have {len(row)} slots",
                at=quoted(str(home.path)),
                cause=f"in the set it has {have}",
                fix="shard again for another number of slots",
            )
        experts = home.root.stacks[number].experts
        problems += row_problems(
            row,
            experts=experts,
            ep_size=home.ep_size,
            where=quoted(name),
            allow_duplicates=True,  # a rank may fill two slots alike
        )
        out[number] = row
    refuse_misfits(problems)
    return out


def changed_slots(home: Home, old: Rows, new: Rows) -> dict[str, tuple[tuple[int, int], ...]]:
    """(local slot, expert) of this rank's slots that have another expert now, by stack."""
    out = {}
    for number, row in new.items():
        share = len(row) // home.ep_size
        mine = range(home.rank * share, (home.rank + 1) * share)
        found = tuple((p - mine.start, row[p]) for p in mine if row[p] != old[number][p])
        if found:
            out[home.root.stacks[number].name] = found
    return out


@dataclass(slots=True)
class Catalog:
    """Where the bytes of each expert are, by the files' own placement; other ranks' on demand.

    fetched: what was asked for and is other ranks', each slot as a tensor of its own.
    """

    home: Home
    files: Files
    fetched: dict[tuple[Key, int], Stored] = field(default_factory=dict)
    _found: dict[tuple[Key, int], tuple[Stored, int, int]] = field(default_factory=dict)
    _ranks: set[int] = field(default_factory=set)

    def add(self, rank: int, several: Iterable[Stored]) -> None:
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
                self._found.setdefault((key_of(expert), e), (stored, n, rank))

    def runs(self, key: Key, expert: int, like: Stored) -> tuple[Run, ...]:
        """The bytes of an expert's tensor. Raises MissingShard, Damaged, BadManifest."""
        if (key, expert) not in self._found:
            row = self.home.rows[key[0]]
            share = len(row) // self.home.ep_size
            holders = {p // share for p, e in enumerate(row) if e == expert}
            self._read_one_of(sorted(holders - self._ranks))
        found = self._found.get((key, expert))
        if found is None:
            raise bad(like.entry.name, f"expert {expert} has no tensor like it on another rank")
        stored, number, rank = found
        count, here = (len(s.entry.expert.experts) if s.entry.expert else 1 for s in (like, stored))
        size = (like.entry.stop - like.entry.start) // count
        runs = in_slot(stored.runs, number, here)
        if stored.entry.dtype != like.entry.dtype or sum(r.nbytes for r in runs) != size:
            raise bad(like.entry.name, f"expert {expert} has no tensor like it on another rank")
        if rank != self.home.rank:
            self.fetched[key, expert] = in_slot_alone(stored, number)
        return runs

    def _read_one_of(self, ranks: list[int]) -> None:
        """Read the first of several ranks whose files are there. Raises what the last one does."""
        names = {whose: name for name, whose in part_names(self.home.ep_size).items()}
        for rank in ranks:
            part = next(p for p in self.home.root.parts if p.name == names[rank])
            try:
                self.add(rank, self.home.read_part(part, self.files))
            except MissingShard:
                if rank == ranks[-1]:
                    raise
            else:
                return


def placed_anew(catalog: Catalog, own: Iterable[Stored], rows: Rows) -> list[Stored]:
    """This rank's tensors with the bytes of the experts that `rows` puts into their slots."""
    own, home = tuple(own), catalog.home
    moving = [s for s in own if _experts(s, rows) != _experts(s, home.rows)]
    stacks = {s.entry.expert.stack for s in moving if s.entry.expert}
    catalog.add(home.rank, (s for s in own if s.entry.expert and s.entry.expert.stack in stacks))
    out = []
    for stored in own:
        expert, experts = stored.entry.expert, _experts(stored, rows)
        if expert is None or experts == _experts(stored, home.rows):
            out.append(stored)
            continue
        key = key_of(expert)
        runs = [run for e in experts for run in catalog.runs(key, e, stored)]
        out.append(Stored(stored.entry, joined(runs)))
    return out


def _experts(stored: Stored, rows: Mapping[int, tuple[int, ...]]) -> tuple[int, ...]:
    expert = stored.entry.expert
    return () if expert is None else rows[expert.stack][slice(*(expert.slots or (0, 0)))]
