"""Names of modules: what a stack's are called before and after it changes its layout."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate, takewhile
from typing import Final

from moeconv.core.names import natural_key
from moeconv.detect.stack import Stack
from moeconv.layout.recipe import Layout, Line
from moeconv.manifest.model import StackEntry
from moeconv.quantconfig.match_rules import Names

Matrices = frozenset[tuple[int, str]]  # expert and projection
_SHORTER: Final = 3  # words that a reader may leave out before a name: `model.language_model.`


@dataclass(frozen=True, slots=True)
class Renamed:
    """What some old modules are called now.

    wanted: the new modules that hold just what these hold, None where none do; allowed: all new
    ones that hold nothing else.
    """

    wanted: tuple[str, ...] | None
    allowed: frozenset[str]


class Modules:
    """The modules of stacks that are alike, by what follows a stack's name (a suffix).

    Where experts are joined, the one around them is a module as well: that of the experts, which
    engines ask for by its name. It is none where it is not called so: a router may be in it.
    """

    def __init__(self, stack: Stack, old: Layout, new: Layout) -> None:
        self._old, old_around = _named(stack, old)
        self._new, self._around = _named(stack, new)
        self.leaves = self._old.keys() - {old_around}
        self.old, self.new = frozenset(self._old), frozenset(self._new)
        self.last_words = {s.rpartition(".")[2] for s in self.old | self.new}
        self._within = [_within(names) for names in (self._old, self._new)]
        self._known: dict[frozenset[str], Renamed] = {}

    def renamed(self, named: frozenset[str]) -> Renamed:
        """What these old modules are called now; a whole stack by the module around it."""
        if named not in self._known:
            self._known[named] = self._renamed(named)
        return self._known[named]

    def _renamed(self, named: frozenset[str]) -> Renamed:
        matrices = _held(self._old, named)
        allowed = frozenset(n for n, held in self._new.items() if held <= matrices)
        if self._around in allowed:
            return Renamed((self._around,), allowed)
        if _held(self._new, allowed) != matrices:
            return Renamed(None, allowed)
        return Renamed(tuple(sorted(allowed, key=natural_key)), allowed)

    def is_held(self, suffix: str, held: frozenset[str]) -> bool:
        """Whether a new module is among these, or all that is in it."""
        return suffix in held or (suffix == self._around and self._new.keys() - {suffix} <= held)

    def changed(self, old: frozenset[str], new: frozenset[str]) -> bool:
        """Whether these old modules hold other matrices than these new ones."""
        return _held(self._old, old) != _held(self._new, new)

    def lost(self, suffix: str) -> bool:
        """Whether old modules are in this one, but no new ones."""
        return suffix in self._within[0] and suffix not in self._within[1]


class Renamings:
    """The stacks whose modules get other names: `changed`, in natural order."""

    def __init__(self, stacks: Iterable[Stack], entries: Iterable[StackEntry]) -> None:
        """entries: of the plan; a stack's old names are those of its origin."""
        by_name = {s.name: s for s in stacks}
        self._kinds: dict[str, tuple[Stack, Layout, Layout]] = {}
        self._known: dict[object, Modules] = {}
        self._of: dict[str, Modules] = {}
        self._names: dict[tuple[str, str], tuple[Names, Names]] = {}
        changed = []
        for entry in entries:
            stack = by_name[entry.name]
            old, new = (stack.recipe.layout(n) for n in (entry.origin_layout, entry.layout))
            if old is not None and new is not None:
                self._kinds[entry.name] = (stack, old, new)
                changed += [entry.name] if old.name != new.name else []
        self.changed = tuple(sorted(changed, key=natural_key))
        self.unchanged = self._kinds.keys() - {*changed}
        self.nested = _nested(by_name)
        self.shorter = {name: tuple(_shorter(name)) for name in self.changed}

    def modules(self, stack: str) -> Modules:
        """The modules of one stack; stacks that are alike share them."""
        if stack not in self._of:
            of, old, new = self._kinds[stack]
            key = (of.recipe.name, old, new, of.sizes.experts, "experts" in stack.split("."))
            if key not in self._known:
                self._known[key] = Modules(of, old, new)
            self._of[stack] = self._known[key]
        return self._of[stack]

    def names(self, stack: str, called: str = "") -> tuple[Names, Names]:
        """The old and the new names of a stack's modules; called: where a reader calls it so."""
        key = (stack, called or stack)
        if key not in self._names:
            modules = self.modules(stack)
            self._names[key] = (Names(key[1], modules.old), Names(key[1], modules.new))
        return self._names[key]

    def found(self, name: str) -> tuple[str, str] | None:
        """The stack that has a module of this name, old or new, and its suffix."""
        for head in _heads(name):
            if head in self._kinds:
                suffix, modules = name[len(head) :], self.modules(head)
                if suffix in modules.old or suffix in modules.new:
                    return head, suffix
        return None

    def near(self, text: str) -> bool:
        """Whether a text that is no pattern can be one of these modules, around one, or its end.

        Lists have thousands of names that are not: they need not be held against every stack.
        """
        if text in self._around or any(head in self._stems for head in _heads(text)):
            return True
        head, _, word = text.rpartition(".")
        return word in self._lasts if head else any(end.endswith(word) for end in self._lasts)

    @cached_property
    def _stems(self) -> frozenset[str]:
        return frozenset(self._kinds).union(*self.shorter.values())

    @cached_property
    def _around(self) -> frozenset[str]:
        return frozenset(path for head in self._stems for path in _heads(head))

    @cached_property
    def _lasts(self) -> frozenset[str]:
        """The last words of the names of stacks and of their modules."""
        ends = (self.modules(stack).last_words for stack in self._kinds)
        return frozenset(head.rpartition(".")[2] for head in self._stems).union(*ends)

    def lost(self, name: str) -> bool:
        """Whether old modules of a stack are in this one, but no new ones."""
        inside = [(h, name[len(h) :]) for h in _heads(name) if h in self._kinds]
        return any(self.modules(head).lost(suffix) for head, suffix in inside)


def _heads(name: str) -> Iterator[str]:
    return accumulate(name.split("."), "{}.{}".format)


def _shorter(name: str) -> Iterator[str]:
    """A stack's name without some of its first words, down to its layer's number."""
    for _ in range(_SHORTER):
        first, _, name = name.partition(".")
        if not name or first.isdecimal() or name.partition(".")[0].isdecimal():
            return
        yield name


def _nested(names: Iterable[str]) -> frozenset[str]:
    """The names with which another one ends."""
    known = set(names)
    ends = (n[at:] for n in known for at in range(1, len(n)))
    return frozenset(end for end in ends if end in known)


def _held(modules: dict[str, Matrices], names: Iterable[str]) -> Matrices:
    return frozenset[tuple[int, str]]().union(*(modules[n] for n in names))


def _within(rests: Iterable[str]) -> frozenset[str]:
    """All names of modules in which some of these are, or which are one of these."""
    return frozenset(head for rest in rests for head in accumulate(rest.split("."), "{}.{}".format))


def _named(stack: Stack, layout: Layout) -> tuple[dict[str, Matrices], str | None]:
    """The modules of a layout, and the one around them, if that is one too."""
    modules = _modules(stack, layout)
    around = _around(modules)
    joined = not all(line.per_expert for line in layout.weight_lines)
    if not joined or "experts" not in (stack.name + around).split("."):
        return modules, None
    return modules | {around: _held(modules, modules)}, around


def _around(rests: Iterable[str]) -> str:
    """The module in which all of these are."""
    columns = zip(*(rest.split(".")[:-1] for rest in rests), strict=False)
    return ".".join(words[0] for words in takewhile(lambda w: len(set(w)) == 1, columns))


def _modules(stack: Stack, layout: Layout) -> dict[str, Matrices]:
    out: dict[str, Matrices] = {}
    everyone = range(stack.sizes.experts)
    for line in layout.weight_lines:
        for expert in everyone if line.per_expert else (None,):
            held = everyone if expert is None else (expert,)
            out[_module(line, expert)] = frozenset((e, p) for e in held for p in line.projections)
    return out


def _module(line: Line, expert: int | None) -> str:
    """What follows the stack's name in a tensor's, without what says which component it is."""
    rest = line.template.removeprefix("{stack}")
    for hole in (".{component}", "_{component}", "{component}", "_{parameter}", "{suffix}"):
        rest = rest.replace(hole, "")
    number = "" if expert is None else str(line.first + expert)
    return rest.replace("{expert}", number)
