"""Which slot holds which expert, layer by layer.

E experts and R redundant copies fill P = E + R slots, P / EP consecutive ones on each rank: slot p
is on rank p // (P / EP).
"""

from __future__ import annotations

import operator
import re
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Final, Protocol, TypeAlias

from moeconv.core.schema import Problems
from moeconv.core.text import LISTED, counted, layer_names, listed, quoted_list
from moeconv.errors import BadPlacement, quoted


@dataclass(frozen=True, slots=True)
class MoeLayers:
    """The layers of a checkpoint, by its own expert stacks; ids are absolute.

    experts: E; moe: the main MoE layers, ascending; beyond: MoE layers of the same kind at or
    beyond `hidden` (MTP); hidden: num_hidden_layers. stated: whether config.json says `hidden`;
    else it is the largest id + 1.
    """

    experts: int
    moe: tuple[int, ...]
    beyond: tuple[int, ...]
    hidden: int
    stated: bool = True

    @property
    def all_moe(self) -> tuple[int, ...]:
        """The main MoE layers and those beyond, in order."""
        return self.moe + self.beyond


@dataclass(frozen=True, slots=True)
class Placement:
    """Expert ids by slot; `layers` are absolute ids, ascending.

    physical_to_logical: [L_moe][P], the expert in each slot.
    """

    experts: int
    layers: tuple[int, ...]
    physical_to_logical: tuple[tuple[int, ...], ...]

    @property
    def slots(self) -> int:
        """P, the slots of a layer."""
        return len(self.physical_to_logical[0]) if self.physical_to_logical else 0

    def row(self, layer: int) -> tuple[int, ...] | None:
        """The experts of a layer by slot: [P]; None where the placement does not cover it."""
        return self.physical_to_logical[self.layers.index(layer)] if layer in self.layers else None


def trivial(experts: int, slots: int) -> tuple[int, ...]:
    """Slot p holds expert p % E: [P]. The default of systems without a map."""
    return tuple(p % experts for p in range(slots))


def round_robin(experts: int, slots: int, ep_size: int) -> tuple[int, ...]:
    """Rank r's s-th slot holds item s * EP + r: [P]. Raises BadPlacement.

    First come the experts in order. A redundant copy is the next expert in turn, or the one after
    it where the next one's first copy is on the same rank.
    """
    if problem := slots_problem(experts, slots, ep_size):
        raise BadPlacement(
            f"{counted(slots, 'slot')} cannot be split evenly among {counted(ep_size, 'rank')}",
            cause=problem,
            fix="choose another number of redundant experts",
        )
    per_rank = slots // ep_size
    return tuple(
        _dealt(s * ep_size + r, experts, ep_size) for r in range(ep_size) for s in range(per_rank)
    )


def _dealt(place: int, experts: int, ep_size: int) -> int:
    if place < experts:
        return place
    turn = (place - experts) % experts
    after = (turn + 1) % experts
    rank = place % ep_size
    return after if turn % ep_size == rank != after % ep_size else turn


def slots_for(experts: int, redundant: int, ep_size: int) -> int:
    """P = E + R. Raises BadPlacement where it does not divide, naming the nearest R that do."""
    if redundant < 0:
        raise BadPlacement(
            f"{redundant} is not a number of redundant experts", cause="below 0", fix="0 or more"
        )
    problem = slots_problem(experts, experts + redundant, ep_size)
    if problem:
        raise BadPlacement(
            f"{counted(experts, 'expert')} and {redundant} redundant ones cannot be split evenly "
            f"among {counted(ep_size, 'rank')}",
            cause=problem,
            fix="pass one of these to `--redundant`, or choose another `--ep`",
        )
    return experts + redundant


def slots_problem(experts: int, slots: int, ep_size: int) -> str | None:
    """Why P slots cannot hold E experts on EP equal ranks, or None where they can."""
    if ep_size < 1:
        return f"ep {ep_size} is not a number of ranks"
    if slots < experts:
        return f"{counted(slots, 'slot')} cannot hold {counted(experts, 'expert')}"
    if slots % ep_size == 0:
        return None
    below = slots - slots % ep_size
    near = [n for n in (below, below + ep_size) if n >= experts]
    nearest = " or ".join(f"{n - experts} redundant ({counted(n, 'slot')})" for n in near)
    total = counted(slots, "slot")
    return f"{total} cannot be split evenly among ep {ep_size}; the nearest that can: {nearest}"


def row_problems(
    row: Sequence[int],
    *,
    experts: int,
    ep_size: int | None,
    where: str,
    allow_duplicates: bool = False,
) -> Iterator[str]:
    """All that is wrong with one layer's row [P]; ep_size None leaves the ranks out.

    Ids are in [0, E), every expert has a slot, P divides by EP, no rank has an expert twice.
    """
    yield from _id_problems(row, experts, where)
    if ep_size is None:
        return
    if uneven := slots_problem(max(experts, 1), len(row), ep_size):
        yield f"{where}: {uneven}"
    elif not allow_duplicates:
        yield from _twice(row, ep_size, where)


def _id_problems(row: Sequence[int], experts: int, where: str) -> Iterator[str]:
    odd = [p for p, expert in enumerate(row) if not 0 <= expert < experts]
    if odd:
        slots, held = listed(odd), listed([row[p] for p in odd])
        yield (
            f"{where}: {'slot' if len(odd) == 1 else 'slots'} {slots} "
            f"{'holds expert' if len(odd) == 1 else 'hold experts'} {held}, "
            f"but ids run from 0 to {experts - 1}"
        )
    held_ids = set(row)
    count = experts - sum(0 <= e < experts for e in held_ids)
    if count:
        # lazily: of a million experts one row may hold a single one, and so may the next
        absent = list(islice((e for e in range(experts) if e not in held_ids), LISTED))
        verb = "expert {} is" if count == 1 else "experts {} are"
        yield f"{where}: {verb.format(listed(absent, count=count))} in no slot"


def _twice(row: Sequence[int], ep_size: int, where: str) -> Iterator[str]:
    """An expert twice on one rank: systems fill the first of the two slots and leave the other."""
    per_rank = len(row) // ep_size
    for rank in range(ep_size if row else 0):
        here = row[rank * per_rank : (rank + 1) * per_rank]
        if len(set(here)) == len(here):
            continue
        held: dict[int, list[int]] = defaultdict(list)
        for slot, expert in enumerate(here, start=rank * per_rank):
            held[expert].append(slot)
        for expert, slots in held.items():
            if len(slots) > 1:
                times = "twice" if len(slots) == 2 else f"{len(slots)} times"
                yield f"{where}: expert {expert} is {times} on rank {rank} (slots {listed(slots)})"


def check(
    placement: Placement, layers: MoeLayers, *, ep_size: int | None, allow_duplicates: bool = False
) -> None:
    """Raise BadPlacement with everything in which the placement does not fit the checkpoint.

    Rows of the layers beyond may be left out: those then keep the trivial placement.
    """
    refuse_misfits(_misfits(placement, layers, ep_size, allow_duplicates=allow_duplicates))


def _misfits(
    placement: Placement, layers: MoeLayers, ep_size: int | None, *, allow_duplicates: bool
) -> Iterator[str]:
    if placement.experts != layers.experts:
        yield (
            f"it is for {counted(placement.experts, 'expert')}, the checkpoint has {layers.experts}"
        )
    if len(placement.layers) != len(placement.physical_to_logical):
        yield (
            f"{counted(len(placement.physical_to_logical), 'row')} "
            f"for {counted(len(placement.layers), 'layer')}"
        )
    if list(placement.layers) != sorted(set(placement.layers)):
        yield "its layers are not in ascending order"
    yield from _layer_problems(placement.layers, layers)
    yield from _row_length_problems(placement, layers, ep_size)
    for layer, row in zip(placement.layers, placement.physical_to_logical, strict=False):
        even = ep_size is not None and slots_problem(layers.experts, len(row), ep_size) is None
        yield from row_problems(
            row,
            experts=layers.experts,
            ep_size=ep_size if even else None,  # stated once for all rows
            where=f"layer {layer}",
            allow_duplicates=allow_duplicates,
        )


def _layer_problems(given: Sequence[int], layers: MoeLayers) -> Iterator[str]:
    """Layers that a map has and the checkpoint lacks, and the other way round."""
    if strange := sorted(set(given) - set(layers.all_moe)):
        yield f"the checkpoint has no experts in {layer_names(strange)}"
    if absent := sorted(set(layers.moe) - set(given)):
        have = "has" if len(absent) == 1 else "have"
        yield f"{layer_names(absent)} of the checkpoint {have} no row"


def _row_length_problems(
    placement: Placement, layers: MoeLayers, ep_size: int | None
) -> Iterator[str]:
    lengths = Counter(map(len, placement.physical_to_logical))
    usual = lengths.most_common(1)[0][0] if lengths else 0
    for layer, row in zip(placement.layers, placement.physical_to_logical, strict=False):
        if len(row) != usual:
            yield f"layer {layer} has {counted(len(row), 'slot')}, others {usual}"
    if ep_size is not None:
        found = (slots_problem(layers.experts, length, ep_size) for length in sorted(lengths))
        yield from filter(None, found)


def refuse_misfits(texts: Iterable[str]) -> None:
    """Raise BadPlacement for a well-formed map that does not fit, if there is any reason."""
    problems = Problems()
    for text in texts:
        problems.note(text)
    if not problems.count:
        return
    raise BadPlacement(
        f"the placement does not fit: {counted(problems.count, 'problem')}",
        cause="\n         ".join(problems.shown()),
        fix="regenerate the map for this checkpoint and this number of ranks",
    )


# --- rows by the names of stacks ---------------------------------------------------------------
class Listable(Protocol):
    """A tensor of torch or an array of NumPy, without importing either."""

    def tolist(self) -> object:
        """Its values as nested lists."""


Row: TypeAlias = Sequence[int] | Listable
Given: TypeAlias = Placement | Mapping[str, Row] | Sequence[Row] | Listable
_LAYER: Final = re.compile(r"(.*\.)?([0-9]{1,9})(?:\.(.+))?", re.DOTALL)


def kind_and_layer(stack: str) -> tuple[tuple[str, str], int] | None:
    """A stack's name without its layer number, and that number; None where it has none."""
    match = _LAYER.fullmatch(stack)
    return ((match[1] or "", match[3] or ""), int(match[2])) if match else None


def by_stack(names: tuple[str, ...], placement: Given) -> dict[str, tuple[int, ...]]:
    """Rows by stack: {name: [P]}, for those of `names` that the placement covers.

    A mapping goes by name. A Placement goes by layer number, among the most numerous kind of
    stacks. Rows alone are one for each name, or one for each stack of that kind, in order.
    Raises BadPlacement where they are of another number, or name what is not there.
    """
    if isinstance(placement, Mapping):
        if strange := [name for name in placement if name not in names]:
            raise _not_by_stack(
                f"the placement names {quoted(str(strange[0]))}, which is not a stack",
                f"unknown names: {len(strange)} of {len(placement)}; "
                f"the stacks are {quoted_list(names)}",
            )
        return {name: _integers(row, quoted(name)) for name, row in placement.items()}
    if isinstance(placement, Placement):
        return _by_layer(names, placement)
    value = placement if isinstance(placement, list | tuple) else _plain(placement)
    if not isinstance(value, list | tuple):
        raise _not_by_stack(
            "the placement is not a list of rows", f"it is a {type(value).__name__}"
        )
    rows = [_integers(row, f"row {n}") for n, row in enumerate(value)]
    if len(rows) == len(names):
        return dict(zip(names, rows, strict=True))
    main = _main_kind(names)
    if len(rows) != len(main):
        raise _not_by_stack(
            f"{counted(len(rows), 'row')} for {counted(len(names), 'stack')}",
            f"there are {counted(len(names), 'stack')}, {len(main)} of the most numerous kind",
        )
    return {main[layer]: row for layer, row in zip(sorted(main), rows, strict=True)}


def _by_layer(names: tuple[str, ...], placement: Placement) -> dict[str, tuple[int, ...]]:
    main = _main_kind(names)
    if strange := [layer for layer in placement.layers if layer not in main]:
        raise _not_by_stack(
            f"the placement has rows for {counted(len(placement.layers), 'layer')}, but there is "
            f"no stack in {layer_names(strange)}",
            f"{counted(len(main), 'stack')} are of the most numerous kind",
        )
    rows = zip(placement.layers, placement.physical_to_logical, strict=True)
    return {main[layer]: row for layer, row in rows}


def kinds_of(names: Iterable[str]) -> list[dict[int, str]]:
    """The kinds of stacks, each as names by layer number.

    A kind is a name without its layer number; a name without one is a kind of its own, layer 0.
    """
    kinds: dict[object, dict[int, str]] = defaultdict(dict)
    for name in names:
        kind, layer = kind_and_layer(name) or (name, 0)
        kinds[kind][layer] = name
    return list(kinds.values())


def _main_kind(names: Sequence[str]) -> dict[int, str]:
    """The most numerous kind of stacks. Raises BadPlacement where two are equally numerous."""
    kinds = kinds_of(filter(kind_and_layer, names))
    most = max(map(len, kinds), default=0)
    main = [kind for kind in kinds if len(kind) == most]
    if len(main) > 1:
        raise _not_by_stack(
            "the placement does not say which stacks it is for",
            f"there are {len(main)} kinds of {counted(most, 'stack')} each, such as "
            f"{quoted(next(iter(main[0].values())))} and {quoted(next(iter(main[1].values())))}",
        )
    return main[0] if main else {}


def _plain(value: object) -> object:
    """Lists in place of a tensor or an array."""
    tolist = getattr(value, "tolist", None)
    return tolist() if callable(tolist) else value


def _integers(row: object, where: str) -> tuple[int, ...]:
    value = _plain(row)
    try:
        if isinstance(value, str | bytes) or not isinstance(value, Iterable):
            raise TypeError
        entries = tuple(value)
        if any(isinstance(entry, bool) for entry in entries):
            raise TypeError
        return tuple(map(operator.index, entries))
    except TypeError:
        raise _not_by_stack(
            f"{where} of the placement is not a row of expert ids", "a row is a list of integers"
        ) from None


def _not_by_stack(message: str, cause: str) -> BadPlacement:
    return BadPlacement(
        message,
        cause=cause,
        fix="pass a mapping from stack names to rows of expert ids, one id for each slot",
    )
