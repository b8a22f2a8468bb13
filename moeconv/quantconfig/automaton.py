"""Automata for patterns of module names: what is matched is read once, character by character.

The patterns come from a file, so none may take long: all steps are taken from one budget.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Final, Literal

Mode = Literal["prefix", "whole", "modules"]
_MAX_STATES: Final = 4000
_MAX_STEPS: Final = 20_000_000  # some seconds
STEPS_A_STATE: Final = 20  # what is kept costs memory: all of it some ten megabytes
_NOTHING: Final = -1  # the automaton's states that no character leads out of
_MATCHED: Final = -2


class Unsupported(ValueError):
    """A pattern that is none, is not regular, or needs more than the budget."""


@dataclass(slots=True)
class Budget:
    """The steps that all patterns of a document may take together."""

    left: int = _MAX_STEPS

    def take(self, steps: int) -> None:
        """Raises Unsupported where they are used up."""
        self.left -= steps
        if self.left < 0:
            raise Unsupported("the budget is used up")


@dataclass(frozen=True, slots=True)
class Chars:
    """One character: any of these, or any other."""

    ranges: tuple[tuple[str, str], ...] = ()
    kinds: str = ""
    negated: bool = False

    def has(self, c: str) -> bool:
        held = any(a <= c <= b for a, b in self.ranges) or any(_is(k, c) for k in self.kinds)
        return held != self.negated


@dataclass(frozen=True, slots=True)
class Edge:
    """`^` or `$`."""

    at: str


@dataclass(frozen=True, slots=True)
class Sequence:
    items: tuple[Node, ...]


@dataclass(frozen=True, slots=True)
class Either:
    items: tuple[Node, ...]


@dataclass(frozen=True, slots=True)
class Repeat:
    item: Node
    least: int
    most: int | None


Node = Chars | Edge | Sequence | Either | Repeat


def _is(kind: str, c: str) -> bool:
    if kind.isupper():
        return not _is(kind.lower(), c)
    return {"d": c.isdecimal(), "w": c.isalnum() or c == "_", "s": c.isspace()}[kind]


class Rests:
    """What may follow a stack's name; one of them for all stacks that are alike.

    ends: their last words.
    """

    __slots__ = ("all", "ends")

    def __init__(self, rests: frozenset[str]) -> None:
        self.all = rests
        self.ends = frozenset(rest.rpartition(".")[2] for rest in rests)


class Pattern:
    """Which names a pattern means.

    mode: `prefix` as `re.match`, `whole` as `re.fullmatch`, `modules` as transformers does: a
    module, with all that is in it.
    """

    def __init__(self, node: Node, mode: Mode, budget: Budget) -> None:
        self._mode = mode
        self._budget = budget
        self._net = _Net()
        end = self._net.add(node, self._net.state())
        self._end = end
        self._numbers: dict[frozenset[int], int] = {}
        self._sets: list[frozenset[int]] = []
        self._next: list[dict[str, int]] = []
        self._ends: list[bool] = []
        self._start = self._number(self._closure({0}, "^"))
        self._known: dict[tuple[int, Rests], frozenset[str]] = {}

    def matches(self, name: str) -> bool:
        """Whether it means this name."""
        return self._final(self._run(self._start, name))

    def among(self, head: str, rests: Rests) -> frozenset[str]:
        """The rests that it means after `head`: looked at once for all heads that are alike."""
        state = self._run(self._start, head)
        if (state, rests) not in self._known:
            hits = (r for r in rests.all if self._final(self._run(state, r)))
            self._known[state, rests] = rests.all if state == _MATCHED else frozenset(hits)
        return self._known[state, rests]

    def _run(self, state: int, text: str) -> int:
        self._budget.take(len(text) if state >= 0 else 1)
        for c in text:
            if state < 0:
                return state
            if self._mode == "modules" and c == "." and self._end in self._sets[state]:
                return _MATCHED
            following = self._next[state]
            if c not in following:
                following[c] = self._step(state, c)
            state = following[c]
        return state

    def _step(self, state: int, c: str) -> int:
        held = self._sets[state]
        self._budget.take(sum(1 + len(t.ranges) for s in held for t, _ in self._net.tests[s]))
        reached = {t for s in held for test, t in self._net.tests[s] if test.has(c)}
        closed = self._closure(reached, "")
        if self._mode == "modules" and c == "." and self._end in closed:
            return _MATCHED
        return self._number(closed)

    def _number(self, held: frozenset[int]) -> int:
        if self._mode == "prefix" and self._end in held:
            return _MATCHED
        if not held:
            return _NOTHING
        if held not in self._numbers:
            self._budget.take(STEPS_A_STATE * len(held))
            self._numbers[held] = len(self._sets)
            self._sets.append(held)
            self._next.append({})
            self._ends.append(self._end in self._closure(set(held), "$"))
        return self._numbers[held]

    def _final(self, state: int) -> bool:
        return state == _MATCHED or (state >= 0 and self._ends[state])

    def _closure(self, states: set[int], at: str) -> frozenset[int]:
        """All states that are reached without a character; at: the edge that stands here."""
        found, todo = set(states), list(states)
        while todo:
            state = todo.pop()
            for edge, target in self._net.jumps[state]:
                if edge in ("", at) and target not in found:
                    found.add(target)
                    todo.append(target)
        self._budget.take(len(found))
        return frozenset(found)


@dataclass(slots=True)
class _Net:
    """A nondeterministic automaton: jumps need no character, or an edge of the name."""

    jumps: list[list[tuple[str, int]]] = field(default_factory=list)
    tests: list[list[tuple[Chars, int]]] = field(default_factory=list)

    def state(self) -> int:
        if len(self.jumps) == _MAX_STATES:
            raise Unsupported("too large")
        self.jumps.append([])
        self.tests.append([])
        return len(self.jumps) - 1

    def add(self, node: Node, start: int) -> int:
        """The state behind `node`, which begins at `start`."""
        if isinstance(node, Sequence):
            for item in node.items:
                start = self.add(item, start)
            return start
        end = self.state()
        if isinstance(node, Chars):
            self.tests[start].append((node, end))
        elif isinstance(node, Edge):
            self.jumps[start].append((node.at, end))
        elif isinstance(node, Either):
            for item in node.items:
                first = self._after(start)
                self.jumps[self.add(item, first)].append(("", end))
        else:
            self._repeat(node, start, end)
        return end

    def _repeat(self, node: Repeat, start: int, end: int) -> None:
        for _ in range(node.least):
            start = self.add(node.item, self._after(start))
        if node.most is None:
            # a state of its own: a loop back to `start` would be one of what stands before, too
            loop = self._after(start)
            self.jumps[self.add(node.item, self._after(loop))].append(("", loop))
            self.jumps[loop].append(("", end))
            return
        self.jumps[start].append(("", end))
        for _ in range(node.most - node.least):
            start = self.add(node.item, self._after(start))
            self.jumps[start].append(("", end))

    def _after(self, state: int) -> int:
        following = self.state()
        self.jumps[state].append(("", following))
        return following
