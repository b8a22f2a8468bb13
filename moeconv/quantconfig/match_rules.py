"""Which module names a text of a quantization config matches, by the rules of its reader.

These depend on the key and on the quantizer: see `list_rules` in `recipes/shared/vocabulary.toml`.
compressed-tensors and Quark write `re:` in front of regular expressions, GPTQModel `+:` and `-:`.

All readers use `re` and `fnmatch`, and so does moeconv. Two bounds keep a hostile pattern from
taking hours: the ways to match that a pattern may have, and the names that all patterns of a
document are tried on.
"""

from __future__ import annotations

import fnmatch
import re
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import Final

from moeconv.layout.shipped import vocabulary

MAX_PATTERN_CHARS: Final = 1000
_MAX_NAMES: Final = 10_000_000  # a name takes about a microsecond
_BYTES_A_NAME: Final = 1024  # a search in so many bytes takes as long as a pattern and a name
_MAX_WAYS: Final = 1 << 24
_WAYS: Final = {"repeat": 64, "digits": 4, "option": 2}  # of a name with 64 characters

_SIGN = re.compile(r"[+-]:")
_MORE_THAN_A_NAME = re.compile(r"[*+?\[\](){}|^$\\]")

_ATOM = re.compile(r"(\\d|\[0-9\])|\\.|\[\^?\]?(?:\\.|[^\]\\])*\]", re.DOTALL)
_GROUP = re.compile(r"\((?:\?(?:[:=!>]|<[=!]|P<\w+>))?([^()]*)\)([*+{]?)")
_OTHER_GROUP = re.compile(r"\(\?(?![:=!>]|<[=!]|P<\w+>)")
_CHOICE = re.compile(r"(?P<digits>0[*+{])|(?P<repeat>[*+{])|(?P<option>\?)")
_IN_A_ROW = re.compile(r"(?:[.a][*+][?+]?){3}")  # `.*.*.*`: cubic in a name's length
_RUN = re.compile(r"\\\w|\{[^}]*\}|((?:[\w-]|\\[^\w\n])+)(?![*+?{])")
_CODE_POINT = re.compile(r"\\[xuUN\d]")


class UnsupportedPattern(ValueError):
    """A pattern is invalid, may take too long, or comes after the budget is used up."""


@dataclass(slots=True)
class Budget:
    """How many more names the patterns of a document may be tried on."""

    left: int = _MAX_NAMES

    def take(self, names: int) -> None:
        """Raises UnsupportedPattern where the budget is used up."""
        self.left -= names
        if self.left < 0:
            raise UnsupportedPattern("the budget is used up")


@dataclass(frozen=True)
class Names:
    """The names of a stack's modules: its own with each suffix appended."""

    stack: str
    suffixes: frozenset[str]

    @cached_property
    def lines(self) -> str:
        """All of them, a line each: one search refutes a literal for all."""
        return "\n".join(("", *(self.stack + suffix for suffix in self.suffixes), ""))


@dataclass(frozen=True, slots=True)
class Matcher:
    """What one text matches.

    literals: every match has one of these in its line.
    """

    matches: Callable[[str], object]
    literals: tuple[str, ...]
    budget: Budget

    def suffixes(self, names: Names) -> frozenset[str]:
        """The suffixes of the names that match. Raises UnsupportedPattern."""
        lines = names.lines
        self.budget.take(1 + len(lines) // _BYTES_A_NAME)
        if not any(literal in lines for literal in self.literals):
            return frozenset()
        self.budget.take(len(names.suffixes))
        stack, matches = names.stack, self.matches
        return frozenset(suffix for suffix in names.suffixes if matches(stack + suffix))


class MatchRules:
    """The rules for one list of a document.

    rule: which of those in `vocabulary.toml`; empty where none is known for its key.
    exact: a name matches the module of this name alone.
    """

    def __init__(self, place: str, method: str) -> None:
        """method: the `quant_method` of the config."""
        self.rule = vocabulary().list_rule(place.rpartition(".")[2], method)
        self.exact = self.rule in {"", "name", "glob"}

    def matcher(self, text: str, budget: Budget) -> Matcher | None:
        """What a text matches; None where it names one module. Raises UnsupportedPattern."""
        if text.startswith("re:"):
            return _regex(text[3:], budget)
        match self.rule:
            case "regex":
                return _regex(_SIGN.sub("", text, count=1), budget)
            case "part":
                return Matcher(lambda name: text in name, (text,), budget)
            case "end":
                return _module_or_end(text, budget, plain=self.is_plain(text))
            case "glob" if is_pattern(text):
                return _glob(text, budget)
        return None

    def guesses(self, text: str, budget: Budget) -> Iterator[Matcher]:
        """What a text that names no known module may match. Raises UnsupportedPattern.

        First what it matches by the rules. If it is not a pattern by these, or one that its author
        may have meant otherwise, also what it would match as a pattern, as the end of a name, and
        as a module with everything in it.
        """
        matcher = self.matcher(text, budget)
        if matcher is not None:
            yield matcher
        if is_pattern(text) and (matcher is None or self.rule == "part"):
            yield _regex(f".*(?:{text})", budget)
            yield _glob(text, budget)
        # a word is to a known reader a class of modules, if anything
        elif matcher is None and ("." in text or not self.rule):
            end, start = f".{text}", f"{text}."
            yield Matcher(
                lambda name: name.endswith(end) or name.startswith(start),
                (f"{end}\n", f"\n{start}"),
                budget,
            )

    def is_plain(self, text: str) -> bool:
        """Whether a text matches a module with all that is in it, or ends of names; no pattern."""
        patterned = text.startswith("re:") or is_pattern(text) or text.endswith(".")
        return self.rule == "end" and not patterned


def is_pattern(text: str) -> bool:
    """Whether a text is more than a name."""
    return _MORE_THAN_A_NAME.search(text) is not None


def _regex(text: str, budget: Budget) -> Matcher:
    return Matcher(_compiled(text), (_literal(text),), budget)


def _glob(text: str, budget: Budget) -> Matcher:
    _refuse_long(text)
    literal = re.split(r"[*?\[]", text, maxsplit=1)[0]
    return Matcher(re.compile(fnmatch.translate(text)).match, (f"\n{literal}",), budget)


def _module_or_end(text: str, budget: Budget, *, plain: bool) -> Matcher:
    """By transformers' `should_convert_module`; plain: a dot is meant as a dot."""
    if plain:
        return Matcher(
            lambda name: name.endswith(text) or f"{name}.".startswith(f"{text}."),
            (f"{text}\n", f"\n{text}"),
            budget,
        )
    match = _compiled(rf"(?:{text})(?:(?<=\.)|(?=\.|$))")
    literals = (_literal(text), f"{text}\n")
    return Matcher(lambda name: match(name) or name.endswith(text), literals, budget)


def _compiled(text: str) -> Callable[[str], object]:
    _refuse_long(text)
    if _ways(text) > _MAX_WAYS:
        raise UnsupportedPattern("may take too long")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # its reader sees them
            return re.compile(text).match
    except (re.error, OverflowError, RecursionError):
        raise UnsupportedPattern("invalid") from None


def _refuse_long(text: str) -> None:
    if len(text) > MAX_PATTERN_CHARS:
        raise UnsupportedPattern("too long")


def _ways(text: str) -> float:
    """How many ways `re` may try to match a name, at most; infinite where it never pays off.

    That is a repeated group that holds repeats or alternatives (`(x+)+y`), and three repeats in a
    row (`.*.*.*y`). Other repeats, options and alternatives multiply.
    """
    if _OTHER_GROUP.search(text):
        return float("inf")  # comments and flags could hide a group
    text = _ATOM.sub(lambda found: "0" if found[1] else "a", text).removesuffix(".*")
    ways = 1.0
    while found := _GROUP.search(text):
        inner = found[1]
        if found[2] and re.search(r"[*+?{|\0]", inner):
            return float("inf")
        ways *= 1 + inner.count("|")
        text = text[: found.start()] + inner.replace("|", "\0") + text[found.end(1) + 1 :]
    if _IN_A_ROW.search(text):
        return float("inf")
    for choice in _CHOICE.finditer(text):
        ways *= _WAYS[choice.lastgroup or ""]
    return ways * (1 + text.count("|"))


def _literal(text: str) -> str:
    """The longest text that is easily seen to be in every match: before any group or class."""
    outside = _GROUP.sub("", _ATOM.sub("a", text))
    if "|" in outside or _CODE_POINT.search(text):
        return ""
    runs = _RUN.finditer(re.split(r"[(\[]", text, maxsplit=1)[0])
    return max((run[1].replace("\\", "") for run in runs if run[1]), key=len, default="")
