"""Which stack gets which rows: by a map, or by a rule; what neither speaks of stays whole."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass
from typing import Final, TypeAlias

from moeconv.core.text import counted
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
class Wish:
    """What the user asks for.

    rows: of a map, [P] by stack name; rule: for the stacks without a row; redundant: R of the
    stacks that a rule places, and what a map must have if it is said. whole: the main stacks must
    be shared, whether or not there is a row for them.
    """

    ep_size: int
    rule: str = TRIVIAL
    rows: dict[str, tuple[int, ...]] | None = None
    redundant: int | None = None
    allow_duplicates: bool = False
    whole: bool = True


def placed(stacks: tuple[Stack, ...], wish: Wish) -> tuple[Sharding, tuple[str, ...]]:
    """The rows of every stack that ranks share, and in words what became of the stacks.

    Stacks that a map leaves out are trivial; where their experts do not divide they stay in the
    common files. Without a map of its own the main kind of stacks must divide.
    Raises BadPlacement with all problems, UsageProblem.
    """
    rows = dict(wish.rows or {})
    if problem := slots_problem(1, wish.ep_size, wish.ep_size):
        refuse_misfits([problem])
    _refuse_other_redundancy(stacks, rows, wish)
    main = {s.name for s in main_kind(stacks)} if wish.whole else set()
    left: dict[int, list[str]] = defaultdict(list)
    for stack in stacks:
        if stack.name in rows:
            continue
        row = _by_rule(stack, wish, required=stack.name in main)
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
            ep_size=wish.ep_size,
            where=quoted(s.name),
            allow_duplicates=wish.allow_duplicates,
        )
    )
    return Sharding(wish.ep_size, rows), tuple(_words(stacks, rows, left, wish))


def _refuse_other_redundancy(
    stacks: tuple[Stack, ...], rows: dict[str, tuple[int, ...]], wish: Wish
) -> None:
    for stack in stacks:
        row = rows.get(stack.name)
        more = len(row or ()) - stack.sizes.experts
        if row is None or wish.redundant in {None, more}:
            continue
        raise UsageProblem(
            f"`--redundant {wish.redundant}` is not what the map has",
            at=quoted(stack.name),
            cause=f"its {len(row)} slots are {abs(more)} {'more' if more >= 0 else 'fewer'} "
            f"than the {stack.sizes.experts} experts",
            fix="leave `--redundant` away: a map says it itself",
        )


def _by_rule(stack: Stack, wish: Wish, *, required: bool) -> tuple[int, ...] | None:
    experts = stack.sizes.experts
    rule = RULES[wish.rule] if wish.rows is None else RULES[TRIVIAL]
    redundant = (wish.redundant or 0) if wish.rows is None else 0
    if required:
        return rule(experts, slots_for(experts, redundant, wish.ep_size), wish.ep_size)
    for slots in (experts + redundant, experts):
        if slots % wish.ep_size == 0:
            row = rule(experts, slots, wish.ep_size)
            # more redundant experts than another kind of stacks has must not fail the whole run
            if wish.allow_duplicates or not any(
                row_problems(row, experts=experts, ep_size=wish.ep_size, where="")
            ):
                return row
    return None


def _words(
    stacks: tuple[Stack, ...],
    rows: dict[str, tuple[int, ...]],
    left: dict[int, list[str]],
    wish: Wish,
) -> list[str]:
    kinds: dict[tuple[str, int, int], int] = defaultdict(int)
    for stack in stacks:
        if stack.name in rows:
            by_map = wish.rows is not None and stack.name in wish.rows
            how = "by the map" if by_map else wish.rule if wish.rows is None else TRIVIAL
            kinds[how, stack.sizes.experts, len(rows[stack.name])] += 1
    words = [
        f"{counted(count, 'stack')} of {counted(experts, 'expert')} {how}: "
        f"{counted(slots // wish.ep_size, 'slot')} on each of {counted(wish.ep_size, 'rank')}"
        + (f", {slots - experts} redundant" if slots > experts else "")
        for (how, experts, slots), count in kinds.items()
    ]
    words += [
        f"{quoted(names[0])}"
        + (f" and {len(names) - 1} more" if len(names) > 1 else "")
        + f": {counted(experts, 'expert')} do not divide by {wish.ep_size}; in the common files"
        for experts, names in left.items()
    ]
    return words
