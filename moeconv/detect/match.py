"""Sorting tensor names into expert stacks: each name is looked at once, whatever E is."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import TypeAlias

from moeconv.checkpoint.header import StoredTensor
from moeconv.errors import quoted
from moeconv.layout.recipe import WEIGHT, Line, Recipe

SHARED = -1  # stands for the expert id of a tensor that holds all experts


@dataclass(slots=True)
class Found:
    """What the names of one stack amount to: tensors by (template, component), then expert."""

    recipe: Recipe
    files: tuple[str, ...]
    tensors: dict[tuple[str, str], dict[int, StoredTensor]] = field(default_factory=dict)
    unknown: list[StoredTensor] = field(default_factory=list)

    def weights(self, template: str) -> dict[int, StoredTensor]:
        """The matrices themselves, by expert, whatever component they are."""
        out: dict[int, StoredTensor] = {}
        for component in self.recipe.weights:
            out |= self.tensors.get((template, component), {})
        return out

    @property
    def passthrough(self) -> str | None:
        """The component because of which this stack is copied as it is, if it has one."""
        return next((c for _, c in self.tensors if c in self.recipe.passed), None)

    def templates(self) -> set[str]:
        """The name templates that occur."""
        return {template for template, _ in self.tensors}

    def place(self, *tensors: StoredTensor) -> str:
        """Where tensors stand: in a checkpoint of 160 shards a name alone does not help."""
        return ", ".join(f"{quoted(self.files[t.file])}, tensor {quoted(t.name)}" for t in tensors)

    def all(self) -> list[StoredTensor]:
        """Every tensor of the stack, unknown ones too."""
        return [t for held in self.tensors.values() for t in held.values()] + self.unknown


@dataclass(frozen=True, slots=True)
class _Rest:
    """What follows a stack's name: a known tensor of it, or (template empty) an unknown one."""

    template: str
    component: str
    expert: int


class _Matcher:
    """One recipe's names as regular expressions, with a memo: stacks repeat the same rests."""

    def __init__(self, recipe: Recipe) -> None:
        self.recipe = recipe
        lines = {line.template: line for layout in recipe.layouts for line in layout.lines}
        self._lines = lines
        # compiled when a name gets there: mostly the first one knows it
        self._patterns: dict[str, tuple[re.Pattern[str], dict[str, str]]] = {}
        stems = "|".join(line.stem() for line in lines.values())
        # a stack that ends in the layer's number is told from other numbers by what follows
        self._stack = re.compile(rf"({recipe.stack_pattern})(?={stems})", re.ASCII | re.DOTALL)
        self._stem = re.compile(stems, re.ASCII)
        self._memo: dict[str, _Rest | None] = {}

    def split(self, name: str) -> tuple[str, _Rest] | None:
        match = self._stack.match(name)
        if match is None:
            return None
        rest = name[match.end() :]
        if rest not in self._memo:
            self._memo[rest] = self._rest(rest)
        known = self._memo[rest]
        return None if known is None else (match.group(1), known)

    def _rest(self, rest: str) -> _Rest | None:
        for template, line in self._lines.items():
            pattern, by_word = self._pattern(template, line)
            match = pattern.fullmatch(rest)
            if match is None:
                continue
            groups = match.groupdict()
            text = groups.get("c")
            component = WEIGHT if text is None else by_word.get(text, text)
            if "e" not in groups:
                return _Rest(template, component, SHARED)
            first, stop = self.recipe.taken or (0, None)
            expert = int(groups["e"])
            if first <= expert and (stop is None or expert < stop):
                return _Rest(template, component, expert - first)
            return None  # another stack's
        return _Rest("", "", SHARED) if self._stem.match(rest) else None

    def _pattern(self, template: str, line: Line) -> tuple[re.Pattern[str], dict[str, str]]:
        """A template's regular expression, and its components by their words."""
        if template not in self._patterns:
            text = line.pattern(self.recipe.components, self.recipe.passed)
            by_word = {line.word(c): c.name for c in self.recipe.components}
            self._patterns[template] = re.compile(text, re.ASCII), by_word
        return self._patterns[template]


_Hit: TypeAlias = tuple[_Matcher, tuple[str, _Rest]]


def collect(
    tensors: Iterable[StoredTensor],
    recipes: tuple[Recipe, ...],
    files: tuple[str, ...],
    *,
    owners: dict[str, str],
) -> tuple[dict[str, Found], tuple[StoredTensor, ...]]:
    """The stacks that the names spell, and the tensors that belong to none.

    A name belongs to the recipe that `owners` says for its stack, else to the first that knows it;
    a name that only begins like an expert tensor is kept with its stack as unknown, so that
    nothing is half understood in silence.
    """
    matchers = [_Matcher(recipe) for recipe in recipes]
    stacks: dict[str, Found] = {}
    others: list[StoredTensor] = []
    for tensor in tensors:
        hits = [(m, hit) for m in matchers if (hit := m.split(tensor.name))]
        if not hits:
            others.append(tensor)
            continue
        matcher, (stack, rest) = hits[0] if len(hits) == 1 else _owner(hits, owners)
        found = stacks.get(stack)
        if found is None:
            found = stacks[stack] = Found(matcher.recipe, files)
        if rest.template:
            found.tensors.setdefault((rest.template, rest.component), {})[rest.expert] = tensor
        else:
            found.unknown.append(tensor)
    return stacks, tuple(others)


def _owner(hits: list[_Hit], owners: dict[str, str]) -> _Hit:
    owned = [(m, hit) for m, hit in hits if owners.get(hit[0]) == m.recipe.name]
    return next(((m, hit) for m, hit in (*owned, *hits) if hit[1].template), hits[0])
