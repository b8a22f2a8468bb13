"""Rename the expert modules that one document names, and say what is left as it was written."""

from __future__ import annotations

import json
import re
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping
from typing import Final, NamedTuple

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
        return first, []  # not JSON, so not a list of modules
    notes = [f"{name}, `{p}`: {n:,} names of experts renamed" for p, n in renamer.renamed.items()]
    notes += [
        f"{name}, `{place}`: names only some experts of a stack; left as it is"
        for place in renamer.partial
    ]
    ambiguous = [
        (found.place, item.text)
        for found in texts
        for item in found.items
        if not (item.rest and _WORD.fullmatch(item.text))  # a key of one word is not a module
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


class _Hit(NamedTuple):
    """The suffixes of a stack's old modules and of its new ones that a text matches.

    exact: it is the name of one module.
    """

    old: frozenset[str]
    new: frozenset[str]
    exact: bool = False


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
        self._patterns: dict[tuple[str, str], dict[str, _Hit] | None] = {}
        self._settled: set[tuple[str, str]] = set()
        self.renamed: Counter[str] = Counter()
        self.partial: dict[str, None] = {}
        self.left: dict[tuple[str, str], None] = {}

    def renamed_list(
        self, place: str, texts: tuple[str, ...]
    ) -> tuple[tuple[str, ...], ...] | None:
        """What replaces each text of a list; None where nothing changes."""
        rules = self._rules(place)
        by_stack: dict[str, dict[int, _Hit]] = defaultdict(dict)
        settled = []
        for number, text in enumerate(texts):
            hits = self._hits(place, rules, text)
            if hits is not None:
                settled.append((place, text))
                for stack, hit in hits.items():
                    by_stack[stack][number] = hit
        self._settled.update(settled)
        out: list[tuple[str, ...]] = [(text,) for text in texts]
        try:
            for stack in sorted(by_stack, key=natural_key):
                self._rename(place, texts, stack, by_stack[stack], out)
        except UnsupportedPattern:
            self.leave(settled)
            return None
        return None if out == [(text,) for text in texts] else tuple(out)

    def leave(self, pairs: Iterable[tuple[str, str]]) -> None:
        """Note that nothing was changed in these places after all; a text of each."""
        for place, text in pairs:
            self.renamed.pop(place, None)
            self.left[place, text] = None

    def _rules(self, place: str) -> MatchRules:
        around = [path for path in self._methods if not path or f"{place}.".startswith(f"{path}.")]
        return MatchRules(place, self._methods[max(around, key=len)] if around else "")

    def _rename(
        self,
        place: str,
        texts: tuple[str, ...],
        stack: str,
        hits: dict[int, _Hit],
        out: list[tuple[str, ...]],
    ) -> None:
        """Put the new names of one stack's modules in the place of the old ones.

        hits: by the numbers of texts; out: what replaces each text.
        """
        modules = self._renamings.modules[stack]
        self._budget.take(sum(1 + len(hit.old) + len(hit.new) for hit in hits.values()))
        renamed = modules.renamed(_NONE.union(*(hit.old for hit in hits.values())))
        if renamed.wanted is None:
            self.partial[place] = None
            return
        wanted = frozenset(renamed.wanted)
        own = {number for number, hit in hits.items() if hit.exact and hit.old}
        going = {number for number in own if hits[number].old.isdisjoint(wanted)}
        staying = [(number, hit) for number, hit in hits.items() if number not in going]
        for number, hit in staying:
            # the name of a module that there was not, or a pattern that matches more than before
            if not hit.new <= renamed.allowed:
                self.left[place, texts[number]] = None
        held = _NONE.union(*(hit.new for _, hit in staying))
        lacking = [suffix for suffix in renamed.wanted if not modules.is_held(suffix, held)]
        self._settled.update((place, stack + suffix) for suffix in wanted)
        for number in going:
            out[number] = ()
        if going or (own and lacking):
            out[min(going or own)] += tuple(stack + suffix for suffix in lacking)
            self.renamed[place] += len(going)
        elif lacking:
            self.left |= {(place, texts[number]): None for number, hit in hits.items() if hit.old}

    def _hits(self, place: str, rules: MatchRules, text: str) -> dict[str, _Hit] | None:
        """The experts that a text names or matches, by stacks that change; None if it has none."""
        found = self._renamings.found(text)
        if found is not None:
            stack, suffix = found
            modules = self._renamings.modules[stack]
            alone = suffix in modules.leaves and stack not in self._renamings.nested
            if rules.exact or alone:
                one = frozenset((suffix,))
                hit = _Hit(one & modules.old, one & modules.new, exact=True)
                return {} if stack in self._renamings.unchanged else {stack: hit}
        key = (place, text)
        if key not in self._patterns:
            self._patterns[key] = None
            if not rules.is_plain(text) or self._renamings.near(text):
                try:
                    matcher = rules.matcher(text, self._budget)
                    self._patterns[key] = None if matcher is None else self._matched(matcher)
                except UnsupportedPattern:
                    self.left[key] = None
        return self._patterns[key]

    def _matched(self, matcher: Matcher) -> dict[str, _Hit] | None:
        hits: dict[str, _Hit] = {}
        for stack in self._renamings.changed:
            old, new = map(matcher.suffixes, self._renamings.names(stack))
            if old or new:
                hits[stack] = _Hit(old, new)
        unchanged = (self._renamings.names(stack)[0] for stack in self._renamings.unchanged)
        return hits if hits or any(map(matcher.suffixes, unchanged)) else None

    def is_ambiguous(self, place: str, text: str, *, single: bool) -> bool:
        """Whether a text that was not renamed may have meant experts, or may mean them now."""
        if (place, text) in self._settled:
            return False
        # a word such as `experts` is never a whole module name; ends of names were tried before
        if vocabulary().expert_modules.in_text(text) and not _WORD.fullmatch(text):
            return True
        rules = self._rules(place)
        is_setting = single and not ("." in text or "*" in text)
        if is_setting or (rules.is_plain(text) and not self._renamings.near(text)):
            return False
        try:
            return any(map(self._changes, rules.guesses(text, self._budget)))
        except UnsupportedPattern:
            return bool(rules.rule) or not single

    def _changes(self, matcher: Matcher) -> bool:
        """Whether other experts match after than before, also by shorter names of the stacks."""
        for stack in self._renamings.changed:
            modules = self._renamings.modules[stack]
            for called in (stack, *self._renamings.shorter[stack]):
                old, new = map(matcher.suffixes, self._renamings.names(stack, called))
                if old != new and modules.changed(old, new):
                    return True
        return False
