"""Names of modules: what a list in quantization_config calls the experts, before and after."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import accumulate, takewhile

from moeconv.layout.recipe import Layout, Line
from moeconv.layout.stack import Stack
from moeconv.manifest import StackEntry
from moeconv.names import natural_key

Matrices = frozenset[tuple[int, str]]  # expert and projection


@dataclass(frozen=True, slots=True)
class _Renaming:
    """One stack's modules before and after, each with the matrices that it holds."""

    old: dict[str, Matrices]
    new: dict[str, Matrices]
    joined: bool


class Renamings:
    """What becomes of names of expert modules when stacks change their layout."""

    def __init__(
        self, stacks: Iterable[Stack], entries: Iterable[StackEntry], listed: Iterable[str]
    ) -> None:
        """entries: of the plan; a stack's old names are those of its origin.

        listed: all names that may be asked for; most checkpoints list no expert at all.
        """
        by_name = {s.name: s for s in stacks}
        heads = {head for name in listed for head in _heads(name)}
        self._of: dict[str, _Renaming] = {}
        entries = tuple(entries)
        self.any = any(e.layout != e.origin_layout for e in entries)
        self._stacks = frozenset(by_name)
        self._written: set[str] = set()
        for entry in entries:
            if entry.name not in heads:
                continue
            stack = by_name[entry.name]
            old, new = (stack.recipe.layout(n) for n in (entry.origin_layout, entry.layout))
            if old is None or new is None or old.name == new.name:
                continue
            one = _Renaming(_modules(stack, old), _modules(stack, new), not new.per_expert)
            self._of |= dict.fromkeys(one.old, one)
        self.kept: list[str] = []  # places of lists that could not be said in new names

    def knows(self, name: str) -> bool:
        """Whether it is a name of the output, or one that `renamed` dealt with."""
        return name in self._of or name in self._written or name in self._stacks

    def renamed(self, place: str, names: tuple[str, ...]) -> tuple[str, ...] | None:
        """A list with the new names; None where it names no expert module that has another."""
        groups: dict[int, tuple[_Renaming, set[str]]] = {}
        for name in names:
            if one := self._of.get(name):
                groups.setdefault(id(one), (one, set()))[1].add(name)
        swaps: dict[int, list[str]] = {}
        for key, (one, named) in groups.items():
            new = _in_new_names(one, named)
            if new is None:
                self.kept.append(place)
            else:
                swaps[key] = new
                self._written.update(new)
        if not swaps:
            return None
        out: list[str] = []
        for name in names:
            key = id(self._of.get(name))
            if key not in swaps:
                out.append(name)
            else:
                out += swaps[key]  # at the place of the first one
                swaps[key] = []
        return tuple(out)


def _heads(name: str) -> Iterator[str]:
    words = name.split(".")
    return accumulate(words, "{}.{}".format)


def _in_new_names(one: _Renaming, named: set[str]) -> list[str] | None:
    """The new modules that hold just what these hold; of a whole stack the module around them.

    Only a module of experts, that is: a router beside them must not come along.
    """
    matrices = frozenset[tuple[int, str]]().union(*(one.old[n] for n in named))
    around = _around(one.new)
    if one.joined and named == one.old.keys() and "experts" in around.split("."):
        return [around]
    covered = [n for n, held in one.new.items() if held <= matrices]
    if frozenset[tuple[int, str]]().union(*(one.new[n] for n in covered)) != matrices:
        return None
    return sorted(covered, key=natural_key)


def _around(modules: Iterable[str]) -> str:
    """The module in which all of these are."""
    columns = zip(*(m.split(".")[:-1] for m in modules), strict=False)
    return ".".join(words[0] for words in takewhile(lambda w: len(set(w)) == 1, columns))


def _modules(stack: Stack, layout: Layout) -> dict[str, Matrices]:
    out: dict[str, Matrices] = {}
    everyone = range(stack.sizes.experts)
    for line in layout.lines:
        for expert in everyone if line.per_expert else (None,):
            held = everyone if expert is None else (expert,)
            name = _module(line, stack.name, expert)
            out[name] = frozenset((e, p) for e in held for p in line.projections)
    return out


def _module(line: Line, stack: str, expert: int | None) -> str:
    """A tensor's name without what says which component it is."""
    rest = line.template.removeprefix("{stack}")
    for hole in (".{component}", "_{component}", "{component}", "_{parameter}", "{suffix}"):
        rest = rest.replace(hole, "")
    number = "" if expert is None else str(line.first + expert)
    return stack + rest.replace("{expert}", number)
