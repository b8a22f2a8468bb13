"""Names of modules: what a stack's are called before and after it changes its layout."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from itertools import accumulate, takewhile

from moeconv.layout.recipe import Layout, Line
from moeconv.layout.stack import Stack
from moeconv.manifest import StackEntry
from moeconv.names import natural_key
from moeconv.plan.automaton import Rests

Matrices = frozenset[tuple[int, str]]  # expert and projection


class Modules:
    """The modules of stacks that are alike, by what follows a stack's name.

    around: the new module in which all the new ones are.
    """

    def __init__(self, stack: Stack, old: Layout, new: Layout) -> None:
        self.old = _modules(stack, old)
        self.new = _modules(stack, new)
        self.around = _around(self.new)
        self._joined = not new.per_expert
        self.old_rests = Rests(frozenset(self.old))
        self.new_rests = Rests(frozenset((*self.new, self.around)))
        self._known: dict[tuple[frozenset[str], bool], tuple[str, ...] | None] = {}

    def renamed(self, stack: str, named: frozenset[str]) -> tuple[str, ...] | None:
        """The new modules that hold just what these hold; of a whole stack the one around them.

        Only a module of experts, that is: a router beside them must not come along.
        """
        whole = self._joined and "experts" in (stack + self.around).split(".")
        if (named, whole) not in self._known:
            self._known[named, whole] = self._renamed(named, whole=whole)
        return self._known[named, whole]

    def _renamed(self, named: frozenset[str], *, whole: bool) -> tuple[str, ...] | None:
        if whole and named == self.old.keys():
            return (self.around,)
        matrices = _held(self.old, named)
        covered = [n for n, held in self.new.items() if held <= matrices]
        if _held(self.new, covered) != matrices:
            return None
        return tuple(sorted(covered, key=natural_key))

    def within(self, rest: str, wanted: tuple[str, ...]) -> bool:
        """Whether a new module holds nothing that is not in these."""
        if self.around in wanted or rest in wanted:
            return True
        return rest != self.around and self.new[rest] <= _held(self.new, wanted)


class Renamings:
    """The stacks whose modules get other names: `changed`, in natural order."""

    def __init__(self, stacks: Iterable[Stack], entries: Iterable[StackEntry]) -> None:
        """entries: of the plan; a stack's old names are those of its origin."""
        by_name = {s.name: s for s in stacks}
        self.stacks = frozenset(by_name)
        self._kinds: dict[str, tuple[Stack, Layout, Layout]] = {}
        self._known: dict[object, Modules] = {}
        self._of: dict[str, Modules] = {}
        for entry in entries:
            stack = by_name[entry.name]
            old, new = (stack.recipe.layout(n) for n in (entry.origin_layout, entry.layout))
            if old is not None and new is not None and old.name != new.name:
                self._kinds[entry.name] = (stack, old, new)
        self.changed = tuple(sorted(self._kinds, key=natural_key))

    def modules(self, stack: str) -> Modules:
        """The modules of one of them."""
        if stack not in self._of:
            of, old, new = self._kinds[stack]
            key = (of.recipe.name, old, new, of.sizes.experts)
            if key not in self._known:
                self._known[key] = Modules(of, old, new)
            self._of[stack] = self._known[key]
        return self._of[stack]

    def found(self, name: str) -> tuple[str, str] | None:
        """The stack that has an old module of this name, and what follows the stack's name."""
        for head in _heads(name):
            if head in self._kinds and (rest := name[len(head) :]) in self.modules(head).old:
                return head, rest
        return None


def _heads(name: str) -> Iterator[str]:
    return accumulate(name.split("."), "{}.{}".format)


def _held(modules: dict[str, Matrices], names: Iterable[str]) -> Matrices:
    return frozenset[tuple[int, str]]().union(*(modules[n] for n in names))


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
