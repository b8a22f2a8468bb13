"""The module names of expert stacks before and after a change of layout."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate
from typing import Final

from moeconv.core.names import natural_key
from moeconv.detect.stack import Stack
from moeconv.layout.recipe import Layout, TensorTemplate
from moeconv.layout.shipped import vocabulary
from moeconv.manifest.model import StackEntry
from moeconv.quantconfig.match_rules import Names

Matrices = frozenset[tuple[int, str]]  # expert and projection
_SHORTER: Final = 3  # words that a reader may leave out before a name: `model.language_model.`


@dataclass(frozen=True, slots=True)
class Renamed:
    """The new modules for some old ones.

    wanted: new modules that together hold exactly the same matrices, None where there are none;
    allowed: all new modules that hold no other matrices.
    """

    wanted: tuple[str, ...] | None
    allowed: frozenset[str]


class Modules:
    """The modules of stacks that are alike, by what follows a stack's name (a suffix).

    Where experts are joined, the module around them counts too: engines look it up by its name.
    It does not count where its name is not one of such modules: a router may be in it.
    """

    def __init__(self, stack: Stack, old: Layout, new: Layout) -> None:
        self._old, old_around = _named(stack, old)
        self._new, self._around = _named(stack, new)
        self.leaves = self._old.keys() - {old_around}
        self.old, self.new = frozenset(self._old), frozenset(self._new)
        self.last_words = {s.rpartition(".")[2] for s in self.old | self.new}
        self._known: dict[frozenset[str], Renamed] = {}

    def renamed(self, named: frozenset[str]) -> Renamed:
        """The new modules for these old ones; for a whole stack the module around it."""
        if named not in self._known:
            matrices = _held(self._old, named)
            allowed = frozenset(n for n, held in self._new.items() if held <= matrices)
            wanted: tuple[str, ...] | None = None
            if self._around in allowed:
                wanted = (self._around,)
            elif _held(self._new, allowed) == matrices:
                wanted = tuple(sorted(allowed, key=natural_key))
            self._known[named] = Renamed(wanted, allowed)
        return self._known[named]

    def is_held(self, suffix: str, held: frozenset[str]) -> bool:
        """Whether a new module, or everything in it, is among these."""
        return suffix in held or (suffix == self._around and self._new.keys() - {suffix} <= held)

    def changed(self, old: frozenset[str], new: frozenset[str]) -> bool:
        """Whether these old modules and these new ones hold different matrices."""
        return _held(self._old, old) != _held(self._new, new)


class Renamings:
    """The modules of all stacks, by their names; stacks that are alike share them.

    changed: stacks whose layout changes, in natural order.
    """

    def __init__(self, stacks: Iterable[Stack], entries: Iterable[StackEntry]) -> None:
        """entries: of the plan; the old names of a stack are those of its origin layout."""
        by_name = {s.name: s for s in stacks}
        kinds: dict[object, Modules] = {}
        self.modules: dict[str, Modules] = {}
        self._names: dict[tuple[str, str], tuple[Names, Names]] = {}
        changed = []
        for entry in entries:
            stack = by_name[entry.name]
            old, new = (stack.recipe.layout(n) for n in (entry.origin_layout, entry.layout))
            if old is not None and new is not None:
                alone = _holds_experts_only(stack.name)
                kind = (stack.recipe.name, old, new, stack.sizes.experts, alone)
                if kind not in kinds:
                    kinds[kind] = Modules(stack, old, new)
                self.modules[entry.name] = kinds[kind]
                changed += [entry.name] if old.name != new.name else []
        self.changed = tuple(sorted(changed, key=natural_key))
        self.unchanged = self.modules.keys() - {*changed}
        self.nested = _nested(by_name)
        self.shorter = {name: tuple(_shorter(name)) for name in self.changed}

    def names(self, stack: str, called: str = "") -> tuple[Names, Names]:
        """The old and the new names of a stack's modules; called: another name for the stack."""
        key = (stack, called or stack)
        if key not in self._names:
            modules = self.modules[stack]
            self._names[key] = (Names(key[1], modules.old), Names(key[1], modules.new))
        return self._names[key]

    def found(self, name: str) -> tuple[str, str] | None:
        """The stack that has a module of this name, old or new, and its suffix."""
        for head in _heads(name):
            if head in self.modules:
                suffix, modules = name[len(head) :], self.modules[head]
                if suffix in modules.old or suffix in modules.new:
                    return head, suffix
        return None

    def near(self, text: str) -> bool:
        """Whether a plain text may be one of these modules, contain one, or be the end of one.

        Lists have thousands of names that are not: those need not be compared with every stack.
        """
        if text in self._around or any(head in self._stems for head in _heads(text)):
            return True
        word = text.rpartition(".")[2]
        return any(last.endswith(word) for last in self._lasts)

    @cached_property
    def _stems(self) -> frozenset[str]:
        return frozenset(self.modules).union(*self.shorter.values())

    @cached_property
    def _around(self) -> frozenset[str]:
        return frozenset(path for head in self._stems for path in _heads(head))

    @cached_property
    def _lasts(self) -> frozenset[str]:
        """The last words of the names of stacks and of their modules."""
        ends = (modules.last_words for modules in self.modules.values())
        return frozenset(head.rpartition(".")[2] for head in self._stems).union(*ends)


def _holds_experts_only(module: str) -> bool:
    return vocabulary().expert_modules.mentioned(module.split("."))


def _heads(name: str) -> Iterator[str]:
    return accumulate(name.split("."), "{}.{}".format)


def _shorter(name: str) -> Iterator[str]:
    """A stack's name without its first one to three words, but with its layer number."""
    for _ in range(_SHORTER):
        first, _, name = name.partition(".")
        if not name or first.isdecimal() or name.partition(".")[0].isdecimal():
            return
        yield name


def _nested(names: Iterable[str]) -> frozenset[str]:
    """The names that another name ends with."""
    known = set(names)
    ends = (n[at:] for n in known for at in range(1, len(n)))
    return frozenset(end for end in ends if end in known)


def _held(modules: dict[str, Matrices], names: Iterable[str]) -> Matrices:
    return frozenset[tuple[int, str]]().union(*(modules[n] for n in names))


def _named(stack: Stack, layout: Layout) -> tuple[dict[str, Matrices], str | None]:
    """The modules of a layout, and the one around them, if it counts (see `Modules`)."""
    modules: dict[str, Matrices] = {}
    everyone = range(stack.sizes.experts)
    for line in layout.weight_lines:
        for expert in everyone if line.per_expert else (None,):
            held = everyone if expert is None else (expert,)
            modules[_module(line, expert)] = frozenset(
                (e, p) for e in held for p in line.projections
            )
    joined = not all(line.per_expert for line in layout.weight_lines)
    shared = set[str].intersection(*({*_heads(rest.rpartition(".")[0])} for rest in modules))
    around = max(shared, key=len, default="")
    if joined and _holds_experts_only(stack.name + around):
        return modules | {around: _held(modules, modules)}, around
    return modules, None


def _module(line: TensorTemplate, expert: int | None) -> str:
    """The suffix of a line's module: its tensors' names without stack and component."""
    rest = line.template.removeprefix("{stack}")
    for placeholder in (".{component}", "_{component}", "{component}", "_{parameter}", "{suffix}"):
        rest = rest.replace(placeholder, "")
    number = "" if expert is None else str(line.first + expert)
    return rest.replace("{expert}", number)
