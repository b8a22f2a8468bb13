"""Patterns of module names that other programs' files hold: matched in linear time, or not at all.

What is a regular language becomes an automaton. Lookarounds, back references and the like are
Unsupported: whoever asked leaves such a pattern alone and says so.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Final

from moeconv.quantconfig.automaton import (
    STEPS_A_STATE,
    Budget,
    Chars,
    Edge,
    Either,
    Mode,
    Node,
    Pattern,
    Repeat,
    Sequence,
    Unsupported,
)

MAX_PATTERN_CHARS: Final = 1000
_MAX_DEPTH: Final = 20
_KINDS: Final = frozenset("dDwWsS")
_SPECIAL: Final = frozenset("*+?{}()|^$")
_COUNT = re.compile(r"\{([0-9]{1,4})?(,)?([0-9]{1,4})?\}")
_ANY: Final = Chars((("\n", "\n"),), negated=True)
_EVERYTHING: Final = Chars(negated=True)


def regular(text: str, mode: Mode, budget: Budget) -> Pattern:
    """A regular expression in Python's syntax. Raises Unsupported."""
    budget.take(STEPS_A_STATE * len(text))
    if len(text) > MAX_PATTERN_CHARS:
        raise Unsupported("too long")
    reader = _Reader(text)
    node = reader.either(0)
    if reader.at < len(text):
        raise Unsupported("a parenthesis too many")
    return Pattern(node, mode, budget)


def glob(text: str, budget: Budget) -> Pattern:
    """A pattern of `fnmatch`. Raises Unsupported."""
    budget.take(STEPS_A_STATE * len(text))
    if len(text) > MAX_PATTERN_CHARS:
        raise Unsupported("too long")
    return Pattern(Sequence(tuple(_wildcards(text))), "whole", budget)


def _wildcards(text: str) -> Iterator[Node]:
    at = 0
    while at < len(text):
        c, at = text[at], at + 1
        # a bracket that comes first is one of the class
        begin = at + (text[at : at + 1] == "!")
        stop = text.find("]", begin + 1) if c == "[" else -1
        if c == "*":
            yield Repeat(_EVERYTHING, 0, None)
        elif c == "?":
            yield _EVERYTHING
        elif stop >= 0:
            yield _wildcard_class(text[begin:stop], negated=begin > at)
            at = stop + 1
        else:
            yield Chars(((c, c),))


def _wildcard_class(members: str, *, negated: bool) -> Chars:
    ranges: list[tuple[str, str]] = []
    at = 0
    while at < len(members):
        reach = 2 if members[at + 1 : at + 2] == "-" and at + 2 < len(members) else 0
        ranges.append((members[at], members[at + reach]))
        at += reach + 1
    # from more to less is nothing to fnmatch
    return Chars(tuple((low, high) for low, high in ranges if low <= high), negated=negated)


class _Reader:
    """Reads a regular expression, as far as it is regular."""

    def __init__(self, text: str) -> None:
        self.text = text
        self.at = 0

    def either(self, depth: int) -> Node:
        if depth > _MAX_DEPTH:
            raise Unsupported("too deep")
        found = [self._sequence(depth)]
        while self._taken("|"):
            found.append(self._sequence(depth))
        return Either(tuple(found))

    def _sequence(self, depth: int) -> Node:
        return Sequence(tuple(self._items(depth)))

    def _items(self, depth: int) -> Iterator[Node]:
        while self.at < len(self.text) and self.text[self.at] not in "|)":
            yield self._repeated(self._item(depth))

    def _item(self, depth: int) -> Node:
        c = self._one()
        if c == "(":
            if self._taken("?") and not self._taken(":"):
                raise Unsupported("looks around, or has flags")
            inner = self.either(depth + 1)
            if not self._taken(")"):
                raise Unsupported("a parenthesis too few")
            return inner
        if c in "^$":
            return Edge(c)
        if c == ".":
            return _ANY
        if c == "[":
            return self._class()
        if c == "\\":
            return self._escaped()
        if c in _SPECIAL:
            raise Unsupported("a quantifier of nothing")
        return Chars(((c, c),))

    def _repeated(self, item: Node) -> Node:
        counted = _COUNT.match(self.text, self.at)
        if self._taken("*"):
            item = Repeat(item, 0, None)
        elif self._taken("+"):
            item = Repeat(item, 1, None)
        elif self._taken("?"):
            item = Repeat(item, 0, 1)
        elif counted and (counted[1] or counted[3]):
            self.at = counted.end()
            least = int(counted[1] or 0)
            most = least if not counted[2] else int(counted[3]) if counted[3] else None
            if most is not None and most < least:
                raise Unsupported("from more to less")
            item = Repeat(item, least, most)
        else:
            return item
        self._taken("?")  # lazy: the same names
        if self.at < len(self.text) and self.text[self.at] in "*+?{":
            raise Unsupported("possessive, or a quantifier of a quantifier")
        return item

    def _escaped(self) -> Chars:
        c = self._one()
        if c in _KINDS:
            return Chars(kinds=c)
        if c.isalnum():
            raise Unsupported("an escape of another meaning")
        return Chars(((c, c),))

    def _class(self) -> Chars:
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
        return Chars(tuple(ranges), kinds, negated)

    def _member(self) -> Chars:
        c = self._one()
        if c == "\\":
            return self._escaped()
        if c in "[&~|":
            raise Unsupported("may mean a set one day")
        return Chars(((c, c),))

    def _one(self) -> str:
        if self.at == len(self.text):
            raise Unsupported("ends too early")
        self.at += 1
        return self.text[self.at - 1]

    def _taken(self, c: str) -> bool:
        taken = self.text[self.at : self.at + 1] == c
        self.at += taken
        return taken
