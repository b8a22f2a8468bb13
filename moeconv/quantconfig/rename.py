"""Rename the expert modules that one document names, and say what is left as it was written."""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Final

from moeconv.core.names import natural_key
from moeconv.core.text import quoted_list
from moeconv.layout.shipped import vocabulary
from moeconv.quantconfig.document import changed_lists, quant_methods, quant_texts
from moeconv.quantconfig.match_rules import Budget, Matcher, MatchRules, UnsupportedPattern
from moeconv.quantconfig.modules import Renamings

_NONE: Final = frozenset[str]()
_WORD: Final = re.compile(r"\w+")


def renamed_document(
    name: str, first: bytes, renamings: Renamings, *, inside: bool
) -> tuple[bytes, list[str]]:
    """A document with the new names of modules, and notes on what changed and what did not.

    first: the document with the old names; inside: whether all of it is about quantization.
    """
    if not renamings.changed:
        return first, []
    try:
        json.loads(first)
        document = first.decode("utf-8")
        texts = quant_texts(document, inside=inside)
        renamer = _Renamer(renamings, quant_methods(texts))
        after, unchanged = changed_lists(document, texts, renamer.renamed_list)
        renamer.leave(unchanged)
    except (ValueError, IndexError, RecursionError):
        return first, []  # no JSON, and nobody's list of modules
    notes = [f"{name}, `{p}`: {n:,} names of experts renamed" for p, n in renamer.renamed.items()]
    notes += [
        f"{name}, `{place}`: names some experts of a stack only, left as it is"
        for place in renamer.partial
    ]
    ambiguous = [
        (found.place, item.text)
        for found in texts
        for item in found.items
        if not (item.rest and _WORD.fullmatch(item.text))  # a key of one word is no module
        and renamer.is_ambiguous(found.place, item.text, single=found.single)
    ]
    return after.encode("utf-8"), notes + _left_notes(name, [*renamer.left, *ambiguous])


def _left_notes(name: str, pairs: list[tuple[str, str]]) -> list[str]:
    left: dict[str, list[str]] = {}
    for place, text in dict.fromkeys(pairs):
        left.setdefault(place, []).append(text)
    return [
        f"{name}, `{place}`: {quoted_list(texts, most=1)} "
        "left as written: check whether the new names still match"
        for place, texts in left.items()
    ]


@dataclass(frozen=True, slots=True)
class _Match:
    """Suffixes of the old modules and of the new ones that a text matches, by stack."""

    old: dict[str, frozenset[str]]
    new: dict[str, frozenset[str]]


@dataclass(slots=True)
class _List:
    """A list of texts; out: what replaces each of them.

    named: the indices of exact names, by stack and suffix; patterns: the rest, by index.
    """

    place: str
    texts: tuple[str, ...]
    out: list[list[str]]
    named: dict[str, dict[str, list[int]]] = field(default_factory=dict)
    patterns: dict[int, _Match] = field(default_factory=dict)

    def stacks(self) -> list[str]:
        """The stacks that it speaks of."""
        matched = ({*m.old, *m.new} for m in self.patterns.values())
        return sorted({*self.named}.union(*matched), key=natural_key)


class _Renamer:
    """Renames the lists of one document, one after the other.

    renamed: how many names were, by place; partial: places that name experts which no new names
    stand for; left: texts that do not match the same experts any more, with their places.
    """

    def __init__(self, renamings: Renamings, methods: Mapping[str, str]) -> None:
        """methods: each `quant_method`, by the place of its section."""
        self._renamings = renamings
        self._budget = Budget()
        self._methods = methods
        self._matches: dict[tuple[str, str], _Match | None] = {}
        self._settled: set[tuple[str, str]] = set()
        self.renamed: Counter[str] = Counter()
        self.partial: dict[str, None] = {}
        self.left: dict[tuple[str, str], None] = {}

    def renamed_list(
        self, place: str, texts: tuple[str, ...]
    ) -> tuple[tuple[str, ...], ...] | None:
        """What replaces each text of a list; None where nothing changes."""
        found = _List(place, texts, [[text] for text in texts])
        rules = self._rules(place)
        for number, text in enumerate(texts):
            if hit := self._module(rules, text):
                self._settled.add((place, text))
                if hit[0] not in self._renamings.unchanged:
                    found.named.setdefault(hit[0], {}).setdefault(hit[1], []).append(number)
            elif match := self._match(place, rules, text):
                self._settled.add((place, text))
                found.patterns[number] = match
        try:
            for stack in found.stacks():
                self._rename(found, stack)
        except UnsupportedPattern:
            self.leave(tuple((place, text) for text in texts if (place, text) in self._settled))
            return None
        made = tuple(map(tuple, found.out))
        return None if made == tuple((text,) for text in texts) else made

    def leave(self, pairs: tuple[tuple[str, str], ...]) -> None:
        """Note that nothing was changed in these places after all; a text of each."""
        for place, text in pairs:
            self.renamed.pop(place, None)
            self.left[place, text] = None

    def _rules(self, place: str) -> MatchRules:
        around = [path for path in self._methods if not path or f"{place}.".startswith(f"{path}.")]
        return MatchRules(place, self._methods[max(around, key=len)] if around else "")

    def _module(self, rules: MatchRules, text: str) -> tuple[str, str] | None:
        """Stack and suffix of a module, if a text matches this one alone."""
        hit = self._renamings.found(text)
        if hit is None or rules.exact:
            return hit
        stack, suffix = hit
        alone = suffix in self._renamings.modules(stack).leaves
        return hit if alone and stack not in self._renamings.nested else None

    def _rename(self, found: _List, stack: str) -> None:
        """Put the new names of one stack's modules in the place of the old ones."""
        place, modules = found.place, self._renamings.modules(stack)
        named = found.named.get(stack, {})
        patterns = {
            number: (match.old.get(stack, _NONE), match.new.get(stack, _NONE))
            for number, match in found.patterns.items()
        }
        self._budget.take(sum(1 + len(old) + len(new) for old, new in patterns.values()))
        old = named.keys() & modules.old
        renamed = modules.renamed(_NONE.union(old, *(before for before, _ in patterns.values())))
        if renamed.wanted is None:
            self.partial[place] = None
            return
        # names that no module had, and one has now; patterns that match more than before
        fresh = named.keys() - old
        for suffix in fresh - renamed.allowed:
            self.left[place, stack + suffix] = None
        for number, (_, after) in patterns.items():
            if not after <= renamed.allowed:
                self.left[place, found.texts[number]] = None
        held = _NONE.union(fresh, *(after for _, after in patterns.values()))
        staying = old & set(renamed.wanted)  # names of both layouts
        lacking = [
            stack + suffix
            for suffix in renamed.wanted
            if suffix not in staying and not modules.is_held(suffix, held)
        ]
        self._settled.update((place, stack + suffix) for suffix in renamed.wanted)
        going = [number for suffix in old - staying for number in named[suffix]]
        for number in going:
            found.out[number] = []
        if going or (old and lacking):
            first = min(going or [number for suffix in old for number in named[suffix]])
            found.out[first] += lacking
            self.renamed[place] += len(old) - len(staying)
        elif lacking:
            for number, (before, _) in patterns.items():
                if before:
                    self.left[place, found.texts[number]] = None

    def _match(self, place: str, rules: MatchRules, text: str) -> _Match | None:
        """The experts that a text matches; None where it is a name, matches none, or is left."""
        key = (place, text)
        if key not in self._matches:
            self._matches[key] = None
            if not rules.is_plain(text) or self._renamings.near(text):
                try:
                    matcher = rules.matcher(text, self._budget)
                    self._matches[key] = None if matcher is None else self._matched(matcher)
                except UnsupportedPattern:
                    self.left[key] = None
        return self._matches[key]

    def _matched(self, matcher: Matcher) -> _Match | None:
        old: dict[str, frozenset[str]] = {}
        new: dict[str, frozenset[str]] = {}
        for stack in self._renamings.changed:
            for names, hits in zip(self._renamings.names(stack), (old, new), strict=True):
                if suffixes := matcher.suffixes(names):
                    hits[stack] = suffixes
        unchanged = (self._renamings.names(stack)[0] for stack in self._renamings.unchanged)
        return _Match(old, new) if old or new or any(map(matcher.suffixes, unchanged)) else None

    def is_ambiguous(self, place: str, text: str, *, single: bool) -> bool:
        """Whether a text that was not renamed may have meant experts, or may mean them now."""
        if (place, text) in self._settled:
            return False
        # a word such as `experts` is no module's whole name; as an end it was tried before
        if vocabulary().expert_modules.in_text(text) and not _WORD.fullmatch(text):
            return True
        rules = self._rules(place)
        is_setting = single and not ("." in text or "*" in text)
        if is_setting or (rules.is_plain(text) and not self._renamings.near(text)):
            return False
        try:
            guesses = rules.guesses(text, self._budget)
            return self._renamings.lost(text) or any(map(self._changes, guesses))
        except UnsupportedPattern:
            return bool(rules.rule) or not single

    def _changes(self, matcher: Matcher) -> bool:
        """Whether other experts match after than before, also by shorter names of the stacks."""
        for stack in self._renamings.changed:
            modules = self._renamings.modules(stack)
            for called in (stack, *self._renamings.shorter[stack]):
                old, new = map(matcher.suffixes, self._renamings.names(stack, called))
                if old != new and modules.changed(old, new):
                    return True
        return False
