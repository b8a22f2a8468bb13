"""Mentions of expert modules in one document: lists of their names, and of patterns of names.

What its reader takes a pattern for depends on where it stands: compressed-tensors and Quark write
`re:`, modelopt and Quark globs, GPTQModel `+:` and `-:` in front of regular expressions, and
transformers takes all it must not convert for regular expressions.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Final

from moeconv.plan.modules import Modules, Renamings
from moeconv.plan.patterns import Budget, Pattern, Unsupported, glob, regular

_GLOBS: Final = frozenset({"ignore", "exclude", "exclude_modules", "layer_quant_config"})
_SIGN = re.compile(r"[+-]:")
_MORE_THAN_A_NAME = re.compile(r"[*+?\[\](){}|^$\\]")


@dataclass(frozen=True, slots=True)
class _Meaning:
    """What a pattern means of each stack: old modules and new ones, by what follows its name."""

    old: dict[str, frozenset[str]]
    new: dict[str, frozenset[str]]


@dataclass(frozen=True, slots=True)
class _List:
    """A list of texts; out: what stands in the place of each from now on."""

    place: str
    texts: tuple[str, ...]
    patterns: dict[int, _Meaning]
    out: list[list[str]]


class Mentions:
    """What becomes of a document's mentions.

    kept: places whose mentions cannot be said in new names; renamed: how many were, by place;
    added: how many names were put beside patterns; shifted: patterns that mean something else of
    the new names, with their places.
    """

    def __init__(self, renamings: Renamings) -> None:
        self._renamings = renamings
        self._budget = Budget()
        self._meanings: dict[tuple[str, str], _Meaning | None] = {}
        self._settled: set[str] = set()
        self.kept: dict[str, None] = {}
        self.renamed: dict[str, int] = {}
        self.added: dict[str, int] = {}
        self.shifted: dict[tuple[str, str], None] = {}

    def settled(self, place: str, text: str) -> bool:
        """Whether there is nothing to say of it any more."""
        if text in self._settled or text in self._renamings.stacks:
            return True
        return self._meanings.get((place, text)) is not None

    def reworded(self, place: str, texts: tuple[str, ...]) -> tuple[tuple[str, ...], ...] | None:
        """What stands in the place of each text of a list; None where nothing changes."""
        plain: dict[str, dict[str, list[int]]] = {}
        patterns: dict[int, _Meaning] = {}
        for number, text in enumerate(texts):
            if hit := self._renamings.found(text):
                plain.setdefault(hit[0], {}).setdefault(hit[1], []).append(number)
                self._settled.add(text)
            elif meaning := self._meaning(place, text):
                patterns[number] = meaning
        found = _List(place, texts, patterns, [[text] for text in texts])
        for stack in self._renamings.changed if patterns else plain:
            self._reword(found, stack, plain.get(stack, {}))
        made = tuple(map(tuple, found.out))
        return None if made == tuple((text,) for text in texts) else made

    def _reword(self, found: _List, stack: str, plain: dict[str, list[int]]) -> None:
        """Say in new names what a list says of one stack.

        plain: the old modules that it names, and where.
        """
        place, texts, patterns = found.place, found.texts, found.patterns
        modules = self._renamings.modules(stack)
        naming = [n for n, meaning in patterns.items() if meaning.old[stack]]
        named = frozenset(plain).union(*(patterns[n].old[stack] for n in naming))
        wanted = modules.renamed(stack, named) if named else ()
        if wanted is None:
            self.kept[place] = None
            return
        for number, meaning in patterns.items():
            if any(not modules.within(rest, wanted) for rest in meaning.new[stack]):
                self.shifted[place, texts[number]] = None
        held = frozenset[str]().union(*(meaning.new[stack] for meaning in patterns.values()))
        staying = plain.keys() & set(wanted)  # names of both layouts
        lacking = [
            stack + rest
            for rest in wanted
            if rest not in staying and not _is_held(rest, held, modules)
        ]
        self._settled.update(stack + rest for rest in wanted)
        going = [n for rest, numbers in plain.items() if rest not in staying for n in numbers]
        for number in going:
            found.out[number] = []
        places = going or [n for numbers in plain.values() for n in numbers]
        if going or (places and lacking):
            found.out[min(places)] += lacking
            self.renamed[place] = self.renamed.get(place, 0) + len(plain) - len(staying)
        elif lacking and naming:
            first = naming[0]
            found.out[first] += (_like(texts[first], place, name) for name in lacking)
            self.added[place] = self.added.get(place, 0) + len(lacking)

    def left(self, pairs: tuple[tuple[str, str], ...]) -> None:
        """Nothing was changed in these places after all; a text of each."""
        for place, text in pairs:
            self.renamed.pop(place, None)
            self.added.pop(place, None)
            self.shifted[place, text] = None

    def _meaning(self, place: str, text: str) -> _Meaning | None:
        """What a pattern means; None where it is none, or too much to find out."""
        key = (place, text)
        if key not in self._meanings:
            try:
                pattern = _pattern(place, text, self._budget)
                self._meanings[key] = None if pattern is None else self._meant(pattern)
            except Unsupported:
                self._meanings[key] = None
        return self._meanings[key]

    def _meant(self, pattern: Pattern) -> _Meaning:
        old, new = {}, {}
        for stack in self._renamings.changed:
            modules = self._renamings.modules(stack)
            old[stack] = pattern.among(stack, modules.old_rests)
            new[stack] = pattern.among(stack, modules.new_rests)
            if not old[stack] and pattern.matches(stack):
                old[stack] = modules.old_rests.all  # the module around them means them all
        return _Meaning(old, new)


def _is_held(rest: str, held: frozenset[str], modules: Modules) -> bool:
    return rest in held or (rest == modules.around and modules.new.keys() <= held)


def _pattern(place: str, text: str, budget: Budget) -> Pattern | None:
    """A text as its reader takes it; None where it is a plain name. Raises Unsupported."""
    key = place.rpartition(".")[2]
    if text.startswith("re:"):
        return regular(text[3:], "prefix", budget)
    if key == "dynamic":
        return regular(_SIGN.sub("", text, count=1), "prefix", budget)
    if not _MORE_THAN_A_NAME.search(text):
        return None
    if key == "modules_to_not_convert":
        return regular(text, "modules", budget)
    if key in _GLOBS:
        return glob(text, budget)
    return None


def _like(pattern: str, place: str, name: str) -> str:
    """A name as it must be written beside a pattern."""
    if place.rpartition(".")[2] != "dynamic":
        return name
    sign = _SIGN.match(pattern)
    return (sign[0] if sign else "") + re.escape(name)
