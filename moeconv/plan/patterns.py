"""Patterns of module names that other programs' files hold: matched in linear time, or not at all.

They come from a file, so no pattern may take long: what is a regular language becomes an automaton
that reads each character once, and all of it has a budget. Lookarounds, back references and the
like are Unsupported: whoever asked leaves such a pattern alone and says so.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import Final, Literal

Mode = Literal["prefix", "whole", "modules"]
MAX_PATTERN_CHARS: Final = 1000
_MAX_STATES: Final = 4000
_MAX_DEPTH: Final = 20
_MAX_STEPS: Final = 20_000_000  # some seconds
_STEPS_A_STATE: Final = 20  # what is kept costs memory: all of it some ten megabytes
_KINDS: Final = frozenset("dDwWsS")
_SPECIAL: Final = frozenset("*+?{}()|^$")
_COUNT = re.compile(r"\{([0-9]{1,4})?(,)?([0-9]{1,4})?\}")
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
class _Chars:
    """One character: any of these, or any other."""

    ranges: tuple[tuple[str, str], ...] = ()
    kinds: str = ""
    negated: bool = False

    def has(self, c: str) -> bool:
        held = any(a <= c <= b for a, b in self.ranges) or any(_is(k, c) for k in self.kinds)
        return held != self.negated


@dataclass(frozen=True, slots=True)
class _Edge:
    """`^` or `$`."""

    at: str


@dataclass(frozen=True, slots=True)
class _Sequence:
    items: tuple[_Node, ...]


@dataclass(frozen=True, slots=True)
class _Either:
    items: tuple[_Node, ...]


@dataclass(frozen=True, slots=True)
class _Repeat:
    item: _Node
    least: int
    most: int | None


_Node = _Chars | _Edge | _Sequence | _Either | _Repeat
_ANY: Final = _Chars((("\n", "\n"),), negated=True)


def _is(kind: str, c: str) -> bool:
    if kind.isupper():
        return not _is(kind.lower(), c)
    return {"d": c.isdecimal(), "w": c.isalnum() or c == "_", "s": c.isspace()}[kind]


@dataclass(frozen=True, slots=True, eq=False)
class Rests:
    """What may follow a stack's name; one of them for all stacks that are alike."""

    all: frozenset[str]


class Pattern:
    """Which names a pattern means.

    mode: `prefix` as `re.match`, `whole` as `re.fullmatch`, `modules` as transformers does: a
    module, with all that is in it.
    """

    def __init__(self, node: _Node, mode: Mode, budget: Budget) -> None:
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
        self._budget.take(len(text))
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
            self._budget.take(_STEPS_A_STATE * len(held))
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
    tests: list[list[tuple[_Chars, int]]] = field(default_factory=list)

    def state(self) -> int:
        if len(self.jumps) == _MAX_STATES:
            raise Unsupported("too large")
        self.jumps.append([])
        self.tests.append([])
        return len(self.jumps) - 1

    def add(self, node: _Node, start: int) -> int:
        """The state behind `node`, which begins at `start`."""
        if isinstance(node, _Sequence):
            for item in node.items:
                start = self.add(item, start)
            return start
        end = self.state()
        if isinstance(node, _Chars):
            self.tests[start].append((node, end))
        elif isinstance(node, _Edge):
            self.jumps[start].append((node.at, end))
        elif isinstance(node, _Either):
            for item in node.items:
                first = self._after(start)
                self.jumps[self.add(item, first)].append(("", end))
        else:
            self._repeat(node, start, end)
        return end

    def _repeat(self, node: _Repeat, start: int, end: int) -> None:
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


def regular(text: str, mode: Mode, budget: Budget) -> Pattern:
    """A regular expression in Python's syntax. Raises Unsupported."""
    budget.take(_STEPS_A_STATE * len(text))
    if len(text) > MAX_PATTERN_CHARS:
        raise Unsupported("too long")
    reader = _Reader(text)
    node = reader.either(0)
    if reader.at < len(text):
        raise Unsupported("a parenthesis too many")
    return Pattern(node, mode, budget)


def glob(text: str, budget: Budget) -> Pattern:
    """A pattern of `fnmatch`. Raises Unsupported."""
    budget.take(_STEPS_A_STATE * len(text))
    if len(text) > MAX_PATTERN_CHARS or "[" in text:
        raise Unsupported("too long, or a class, which is one in other words")
    everything = _Chars(negated=True)
    words: dict[str, _Node] = {"*": _Repeat(everything, 0, None), "?": everything}
    items: Iterable[_Node] = (words.get(c) or _Chars(((c, c),)) for c in text)
    return Pattern(_Sequence(tuple(items)), "whole", budget)


class _Reader:
    """Reads a regular expression, as far as it is regular."""

    def __init__(self, text: str) -> None:
        self.text = text
        self.at = 0

    def either(self, depth: int) -> _Node:
        if depth > _MAX_DEPTH:
            raise Unsupported("too deep")
        found = [self._sequence(depth)]
        while self._taken("|"):
            found.append(self._sequence(depth))
        return _Either(tuple(found))

    def _sequence(self, depth: int) -> _Node:
        return _Sequence(tuple(self._items(depth)))

    def _items(self, depth: int) -> Iterator[_Node]:
        while self.at < len(self.text) and self.text[self.at] not in "|)":
            yield self._repeated(self._item(depth))

    def _item(self, depth: int) -> _Node:
        c = self._one()
        if c == "(":
            if self._taken("?") and not self._taken(":"):
                raise Unsupported("looks around, or has flags")
            inner = self.either(depth + 1)
            if not self._taken(")"):
                raise Unsupported("a parenthesis too few")
            return inner
        if c in "^$":
            return _Edge(c)
        if c == ".":
            return _ANY
        if c == "[":
            return self._class()
        if c == "\\":
            return self._escaped()
        if c in _SPECIAL:
            raise Unsupported("a quantifier of nothing")
        return _Chars(((c, c),))

    def _repeated(self, item: _Node) -> _Node:
        counted = _COUNT.match(self.text, self.at)
        if self._taken("*"):
            item = _Repeat(item, 0, None)
        elif self._taken("+"):
            item = _Repeat(item, 1, None)
        elif self._taken("?"):
            item = _Repeat(item, 0, 1)
        elif counted and (counted[1] or counted[3]):
            self.at = counted.end()
            least = int(counted[1] or 0)
            most = least if not counted[2] else int(counted[3]) if counted[3] else None
            if most is not None and most < least:
                raise Unsupported("from more to less")
            item = _Repeat(item, least, most)
        else:
            return item
        self._taken("?")  # lazy: the same names
        if self.at < len(self.text) and self.text[self.at] in "*+?{":
            raise Unsupported("possessive, or a quantifier of a quantifier")
        return item

    def _escaped(self) -> _Chars:
        c = self._one()
        if c in _KINDS:
            return _Chars(kinds=c)
        if c.isalnum():
            raise Unsupported("an escape of another meaning")
        return _Chars(((c, c),))

    def _class(self) -> _Chars:
        negated = self._taken("^")
        if self._taken("]"):
            raise Unsupported("an empty class, or one with a bracket")
        ranges: list[tuple[str, str]] = []
        kinds = ""
        while not self._taken("]"):
            first = self._member()
            if first.kinds:
                kinds += first.kinds
                if self.text[self.at : self.at + 1] == "-":
                    raise Unsupported("no range")
                continue
            low = high = first.ranges[0][0]
            if self.text[self.at : self.at + 1] == "-" and self.text[self.at + 1 :][:1] != "]":
                self.at += 1
                last = self._member()
                if last.kinds or last.ranges[0][0] < low:
                    raise Unsupported("no range")
                high = last.ranges[0][0]
            ranges.append((low, high))
        return _Chars(tuple(ranges), kinds, negated)

    def _member(self) -> _Chars:
        c = self._one()
        if c == "\\":
            return self._escaped()
        if c in "[&~|":
            raise Unsupported("may mean a set one day")
        return _Chars(((c, c),))

    def _one(self) -> str:
        if self.at == len(self.text):
            raise Unsupported("ends too early")
        self.at += 1
        return self.text[self.at - 1]

    def _taken(self, c: str) -> bool:
        taken = self.text[self.at : self.at + 1] == c
        self.at += taken
        return taken
