"""How the reader of a list takes its texts: names, patterns, beginnings, ends or parts of names.

That depends on where a list stands, and on who quantised. compressed-tensors and Quark write
`re:`, modelopt and Quark globs, GPTQModel `+:` and `-:` in front of regular expressions.
transformers (`should_convert_module`) takes all that it must not convert for regular expressions
of modules, with what is in them, and for ends of names; AWQ for parts of names.
"""

from __future__ import annotations

import re
from typing import Final, Protocol

from moeconv.quantconfig.automaton import Budget, Rests
from moeconv.quantconfig.patterns import glob, regular

_NAMES: Final = frozenset({"targets", "quantized_layers", "ignored_layers"})
_GLOBS: Final = frozenset({"ignore", "exclude", "exclude_modules", "layer_quant_config"})
_ENDS: Final = frozenset({"modules_to_not_convert", "llm_int8_skip_modules"})
_DYNAMIC: Final = "dynamic"
_SIGN = re.compile(r"[+-]:")
_MORE_THAN_A_NAME = re.compile(r"[*+?\[\](){}|^$\\]")
_NONE: Final = frozenset[str]()


class Reading(Protocol):
    """Which names a text means."""

    def among(self, head: str, rests: Rests) -> frozenset[str]:
        """The rests that it means after `head`."""
        ...


class Place:
    """One place of a document, by its reader's rules.

    exact: whether a name means the module of this name alone; known: whether there are rules;
    parts: whether texts are parts of names, and no patterns.
    """

    def __init__(self, place: str, method: str) -> None:
        """method: who quantised, as config.json says it."""
        key = place.rpartition(".")[2]
        self._dynamic = key == _DYNAMIC
        self.parts = key in _ENDS and method == "awq"
        self._ends = key in _ENDS and not self.parts
        self._globs = key in _GLOBS and method != "compressed-tensors"
        self.exact = not (self._dynamic or self.parts or self._ends)
        self.known = not self.exact or key in _NAMES | _GLOBS

    def reading(self, text: str, budget: Budget) -> Reading | None:
        """What a text means; None where it is a name alone. Raises Unsupported."""
        if text.startswith("re:"):
            return regular(text[3:], "prefix", budget)
        if self._dynamic:
            return regular(_SIGN.sub("", text, count=1), "prefix", budget)
        if self.parts:
            return _Part(text, budget, anywhere=True)
        if self._ends:
            # a dot stands for any character there, which in names of modules is a dot
            plain = self.plain(text)
            module = _Module(text, budget) if plain else regular(text, "modules", budget)
            return _Either(module, _Part(text, budget, anywhere=False))
        if self._globs and is_pattern(text):
            return glob(text, budget)
        return None

    def plain(self, text: str) -> bool:
        """Whether a text means a module with what is in it, or ends of names, and no pattern."""
        patterned = text.startswith("re:") or is_pattern(text) or text.endswith(".")
        return self._ends and not patterned

    def beside(self, pattern: str, name: str) -> str:
        """A name as it must be written beside a pattern."""
        if not self._dynamic:
            return name
        sign = _SIGN.match(pattern)
        return (sign[0] if sign else "") + re.escape(name)


def is_pattern(text: str) -> bool:
    """Whether a text is more than a name."""
    return _MORE_THAN_A_NAME.search(text) is not None


def guesses(text: str, budget: Budget) -> tuple[Reading, ...]:
    """What a pattern may mean whose reader is not known. Raises Unsupported."""
    return (regular(f".*(?:{text})", "prefix", budget), glob(text, budget))


def ending(text: str, budget: Budget) -> Reading:
    """All names that end so."""
    return _Part(text, budget, anywhere=False)


class _Module:
    """A module, with all that is in it."""

    def __init__(self, text: str, budget: Budget) -> None:
        self._text = text
        self._budget = budget

    def among(self, head: str, rests: Rests) -> frozenset[str]:
        text = self._text
        self._budget.take(1)
        if head == text or head.startswith(text + "."):
            return rests.all
        if not text.startswith(head):
            return _NONE
        rest = text[len(head) :]
        self._budget.take(len(rests.all))
        return frozenset(r for r in rests.all if r == rest or r.startswith(rest + "."))


class _Part:
    """All names with a text in them, or at their end."""

    def __init__(self, text: str, budget: Budget, *, anywhere: bool) -> None:
        self._text = text
        self._budget = budget
        self._anywhere = anywhere
        self._known: dict[Rests, tuple[frozenset[str], dict[str, frozenset[str]]]] = {}

    def among(self, head: str, rests: Rests) -> frozenset[str]:
        self._budget.take(1)
        if self._anywhere and self._text in head:
            return rests.all
        if rests not in self._known:
            self._known[rests] = self._looked_at(rests)
        found, across = self._known[rests]
        for lead, more in across.items():
            if head.endswith(lead):
                found |= more
        return found

    def _looked_at(self, rests: Rests) -> tuple[frozenset[str], dict[str, frozenset[str]]]:
        """The rests that it means after any head, and those after heads that end so."""
        if not self._anywhere and not self._may_end(rests):
            return _NONE, {}
        self._budget.take(len(rests.all))
        text = self._text
        inside = frozenset(
            r for r in rests.all if r.endswith(text) or (self._anywhere and text in r)
        )
        across: dict[str, frozenset[str]] = {}
        first = {r[:1] for r in rests.all}
        for at in (n for n in range(1, len(text) + 1) if text[n : n + 1] in first):
            tail = text[at:]
            self._budget.take(len(rests.all) if self._anywhere else 1)
            if self._anywhere:
                hits = frozenset(r for r in rests.all if r.startswith(tail))
            else:
                hits = rests.all & {tail}
            if hits:
                across[text[:at]] = hits
        return inside, across

    def _may_end(self, rests: Rests) -> bool:
        """Whether any name may: a list can have thousands that can't."""
        dot, word = "." in self._text, self._text.rpartition(".")[2]
        return "" in rests.all or any(e == word if dot else e.endswith(word) for e in rests.ends)


class _Either:
    def __init__(self, one: Reading, other: Reading) -> None:
        self._both = (one, other)

    def among(self, head: str, rests: Rests) -> frozenset[str]:
        one, other = (reading.among(head, rests) for reading in self._both)
        return one | other
