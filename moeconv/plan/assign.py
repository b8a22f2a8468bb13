"""Assign experts to ranks: each stack's `physical_to_logical` row, from a map or by a rule."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass
from typing import Final, TypeAlias

from moeconv.core.text import counted, quoted_list
from moeconv.detect.moe_layers import main_kind
from moeconv.detect.stack import Stack
from moeconv.errors import UsageProblem, quoted
from moeconv.placement.model import (
    refuse_misfits,
    round_robin,
    row_problems,
    slots_for,
    slots_problem,
    trivial,
)
from moeconv.plan.shard import Sharding

TRIVIAL: Final = "trivial"
ROUND_ROBIN: Final = "round-robin"
Rule: TypeAlias = Callable[[int, int, int], tuple[int, ...]]  # (E, P, ep) -> [P]
RULES: Final[dict[str, Rule]] = {
    TRIVIAL: lambda experts, slots, _: trivial(experts, slots),
    ROUND_ROBIN: round_robin,
}


@dataclass(frozen=True, slots=True)
class PlacementRequest:
    """A placement as the user requests it.

    rows: those of a map, [P] by stack name; rule: for stacks without a row; redundant: the number
    of redundant experts R of stacks that a rule places; a map must agree with it. whole: the main
    stacks must be split among ranks, even without a row.
    """

    ep_size: int
    rule: str = TRIVIAL
    rows: dict[str, tuple[int, ...]] | None = None
    redundant: int | None = None
    allow_duplicates: bool = False
    whole: bool = True


def placed(
    stacks: tuple[Stack, ...], request: PlacementRequest
) -> tuple[Sharding, tuple[str, ...]]:
    """The rows of every stack that is split among ranks, and notes on how each was placed.

    Stacks that a map leaves out are trivial, with as many slots as the map gives stacks of as many
    experts: engines take one number for all. Where their experts do not divide they stay in the
    common files. Without a map of its own the main kind of stacks must divide.
    Raises BadPlacement with all problems, UsageProblem.
    """
    rows = dict(request.rows or {})
    if problem := slots_problem(1, request.ep_size, request.ep_size):
        refuse_misfits([problem])
    _refuse_other_redundancy(stacks, rows, request)
    main = {s.name for s in main_kind(stacks)} if request.whole else set()
    more = _redundant_in_map(stacks, rows)
    left: dict[int, list[str]] = defaultdict(list)
    for stack in stacks:
        if stack.name in rows:
            continue
        row = _by_rule(stack, request, more, required=stack.name in main)
        if row is None:
            left[stack.sizes.experts].append(stack.name)
        else:
            rows[stack.name] = row
    refuse_misfits(
        problem
        for s in stacks
        if s.name in rows
        for problem in row_problems(
            rows[s.name],
            experts=s.sizes.experts,
            ep_size=request.ep_size,
            where=quoted(s.name),
            allow_duplicates=request.allow_duplicates,
        )
    )
    return Sharding(request.ep_size, rows), tuple(_notes(stacks, rows, left, request))


def _refuse_other_redundancy(
    stacks: tuple[Stack, ...], rows: dict[str, tuple[int, ...]], request: PlacementRequest
) -> None:
    for stack in stacks:
        row = rows.get(stack.name)
        more = len(row or ()) - stack.sizes.experts
        if row is None or request.redundant in {None, more}:
            continue
        raise UsageProblem(
            f"`--redundant {request.redundant}` does not agree with the map",
            at=quoted(stack.name),
            cause=f"its {len(row)} slots are {abs(more)} {'more' if more >= 0 else 'fewer'} "
            f"than the {stack.sizes.experts} experts",
            fix="drop `--redundant`: the map determines the number of redundant experts",
        )


def _redundant_in_map(
    stacks: tuple[Stack, ...], rows: dict[str, tuple[int, ...]]
) -> dict[int, int]:
    """The most redundant experts R that a map gives a stack of E experts: by E."""
    more: dict[int, int] = {}
    for stack in stacks:
        experts = stack.sizes.experts
        if stack.name in rows:
            more[experts] = max(more.get(experts, 0), len(rows[stack.name]) - experts)
    return more


def _by_rule(
    stack: Stack, request: PlacementRequest, more: dict[int, int], *, required: bool
) -> tuple[int, ...] | None:
    """more: R of the map's own stacks by E, for those that it leaves out."""
    experts = stack.sizes.experts
    rule = RULES[request.rule] if request.rows is None else RULES[TRIVIAL]
    redundant = request.redundant or 0
    if request.rows is not None:
        redundant = more.get(experts, redundant)
    if required:
        return rule(experts, slots_for(experts, redundant, request.ep_size), request.ep_size)
    for slots in (experts + redundant, experts):
        if slots % request.ep_size == 0:
            row = rule(experts, slots, request.ep_size)
            # more redundant experts than another kind of stacks has must not fail the whole run
            if request.allow_duplicates or not any(
                row_problems(row, experts=experts, ep_size=request.ep_size, where="")
            ):
                return row
    return None


def _notes(
    stacks: tuple[Stack, ...],
    rows: dict[str, tuple[int, ...]],
    left: dict[int, list[str]],
    request: PlacementRequest,
) -> list[str]:
    kinds: dict[tuple[str, int, int], int] = defaultdict(int)
    for stack in stacks:
        if stack.name in rows:
            by_map = request.rows is not None and stack.name in request.rows
            how = "by the map" if by_map else request.rule if request.rows is None else TRIVIAL
            kinds[how, stack.sizes.experts, len(rows[stack.name])] += 1
    notes = [
        f"{counted(count, 'stack')} of {counted(experts, 'expert')} {how}: "
        f"{counted(slots // request.ep_size, 'slot')} on each of {counted(request.ep_size, 'rank')}"
        + (f", {slots - experts} redundant" if slots > experts else "")
        for (how, experts, slots), count in kinds.items()
    ]
    notes += [
        f"{quoted_list(names, most=1)}: {counted(experts, 'expert')} are not divisible by "
        f"{request.ep_size}: kept in the common files"
        for experts, names in left.items()
    ]
    return notes
