"""Mentions of expert modules in one document: lists of their names, and of patterns of names."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Final

from moeconv.core.names import natural_key
from moeconv.quantconfig.automaton import Budget, Unsupported
from moeconv.quantconfig.match_rules import Place, Reading
from moeconv.quantconfig.modules import Modules, Renamings

_NONE: Final = frozenset[str]()


@dataclass(frozen=True, slots=True)
class _Meaning:
    """What a text means, by stack: old modules and new ones, by what follows the stack's name.

    unchanged: whether it means modules that keep their names.
    """

    old: dict[str, frozenset[str]]
    new: dict[str, frozenset[str]]
    unchanged: bool

    def __bool__(self) -> bool:
        return bool(self.old or self.new or self.unchanged)


@dataclass(slots=True)
class _List:
    """A list of texts; out: what stands in the place of each from now on.

    plain: where modules are named, by stack and what follows its name.
    """

    place: str
    texts: tuple[str, ...]
    out: list[list[str]]
    plain: dict[str, dict[str, list[int]]] = field(default_factory=dict)
    patterns: dict[int, _Meaning] = field(default_factory=dict)

    def stacks(self) -> list[str]:
        """Those of which it speaks."""
        named = {*self.plain}.union(*({*m.old, *m.new} for m in self.patterns.values()))
        return sorted(named, key=natural_key)


class Mentions:
    """What becomes of a document's mentions.

    kept: places whose mentions cannot be said in new names; renamed: how many were, by place;
    added: how many names were put beside patterns; shifted: texts that mean something else of
    the new names, with their places.
    """

    def __init__(self, renamings: Renamings, methods: Mapping[str, str]) -> None:
        """methods: who quantised, by the place where that is said."""
        self.renamings = renamings
        self.budget = Budget()
        self._methods = methods
        self._meanings: dict[tuple[str, str], _Meaning | None] = {}
        self._settled: set[tuple[str, str]] = set()
        self.kept: dict[str, None] = {}
        self.renamed: dict[str, int] = {}
        self.added: dict[str, int] = {}
        self.shifted: dict[tuple[str, str], None] = {}

    def settled(self, place: str, text: str) -> bool:
        """Whether there is nothing to say of it any more."""
        return (place, text) in self._settled

    def seen(self, place: str, text: str) -> bool:
        """Whether it was looked at as one of a list."""
        return (place, text) in self._settled or (place, text) in self._meanings

    def place(self, place: str) -> Place:
        """A place, by its reader's rules."""
        around = [path for path in self._methods if not path or f"{place}.".startswith(f"{path}.")]
        return Place(place, self._methods[max(around, key=len)] if around else "")

    def reworded(self, place: str, texts: tuple[str, ...]) -> tuple[tuple[str, ...], ...] | None:
        """What stands in the place of each text of a list; None where nothing changes."""
        found = _List(place, texts, [[text] for text in texts])
        reader = self.place(place)
        for number, text in enumerate(texts):
            if hit := self._named(reader, text):
                self._settled.add((place, text))
                if hit[0] not in self.renamings.unchanged:
                    found.plain.setdefault(hit[0], {}).setdefault(hit[1], []).append(number)
            elif meaning := self._meaning(place, reader, text):
                self._settled.add((place, text))
                found.patterns[number] = meaning
        try:
            for stack in found.stacks():
                self._reword(found, reader, stack)
        except Unsupported:
            self.left(tuple((place, text) for text in texts if self.settled(place, text)))
            return None
        made = tuple(map(tuple, found.out))
        return None if made == tuple((text,) for text in texts) else made

    def _named(self, reader: Place, text: str) -> tuple[str, str] | None:
        """The stack and the rest of a module that a text means, if it means this one alone."""
        hit = self.renamings.found(text)
        if hit is None or reader.exact:
            return hit
        stack, rest = hit
        alone = rest in self.renamings.modules(stack).leaves and stack not in self.renamings.nested
        return hit if alone else None

    def _reword(self, found: _List, reader: Place, stack: str) -> None:
        """Say in new names what a list says of one stack."""
        place, texts, patterns = found.place, found.texts, found.patterns
        modules, plain = self.renamings.modules(stack), found.plain.get(stack, {})
        self.budget.take(sum(_size(meaning, stack) for meaning in patterns.values()))
        naming = [n for n, meaning in patterns.items() if stack in meaning.old]
        old = plain.keys() & modules.old_rests.all
        renamed = modules.renamed(_NONE.union(old, *(patterns[n].old[stack] for n in naming)))
        wanted = renamed.wanted
        if wanted is None:
            self.kept[place] = None
            return
        # what was no module and is one now, with patterns that mean more than before
        fresh = {rest: at for rest, at in plain.items() if rest not in old}
        for number, meaning in patterns.items():
            if not meaning.new.get(stack, _NONE) <= renamed.allowed:
                self.shifted[place, texts[number]] = None
        for rest in fresh.keys() - renamed.allowed:
            self.shifted[place, stack + rest] = None
        held = _NONE.union(fresh, *(meaning.new.get(stack, _NONE) for meaning in patterns.values()))
        staying = old & set(wanted)  # names of both layouts
        lacking = [
            stack + rest
            for rest in wanted
            if rest not in staying and not modules.is_held(rest, held)
        ]
        self._settled.update((place, stack + rest) for rest in wanted)
        going = [n for rest in old - staying for n in plain[rest]]
        for number in going:
            found.out[number] = []
        places = going or [n for rest in old for n in plain[rest]]
        if going or (places and lacking):
            found.out[min(places)] += lacking
            self.renamed[place] = self.renamed.get(place, 0) + len(old) - len(staying)
        elif lacking and naming:
            first = naming[0]
            found.out[first] += (reader.beside(texts[first], name) for name in lacking)
            self.added[place] = self.added.get(place, 0) + len(lacking)

    def left(self, pairs: tuple[tuple[str, str], ...]) -> None:
        """Nothing was changed in these places after all; a text of each."""
        for place, text in pairs:
            self.renamed.pop(place, None)
            self.added.pop(place, None)
            self.shifted[place, text] = None

    def _meaning(self, place: str, reader: Place, text: str) -> _Meaning | None:
        """What a text means; None where it is a name alone, or too much to find out."""
        key = (place, text)
        if key not in self._meanings and reader.plain(text) and not self.renamings.near(text):
            self._meanings[key] = None
        if key not in self._meanings:
            try:
                reading = reader.reading(text, self.budget)
                self._meanings[key] = None if reading is None else self._meant(reading)
            except Unsupported:
                self._meanings[key] = None
                self.shifted[key] = None
        return self._meanings[key]

    def _meant(self, reading: Reading) -> _Meaning:
        old: dict[str, frozenset[str]] = {}
        new: dict[str, frozenset[str]] = {}
        for stack, modules in self._changed():
            if hits := reading.among(stack, modules.old_rests):
                old[stack] = hits
            if hits := reading.among(stack, modules.new_rests):
                new[stack] = hits
        unchanged = any(
            reading.among(stack, self.renamings.modules(stack).old_rests)
            for stack in self.renamings.unchanged
        )
        return _Meaning(old, new, unchanged)

    def _changed(self) -> Iterator[tuple[str, Modules]]:
        return ((stack, self.renamings.modules(stack)) for stack in self.renamings.changed)


def _size(meaning: _Meaning, stack: str) -> int:
    return 1 + len(meaning.old.get(stack, _NONE)) + len(meaning.new.get(stack, _NONE))
