"""Sort tensor names into expert stacks, and find the layouts that a stack's names can be of.

Each name is looked at once, whatever E is.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import TypeAlias

from moeconv.checkpoint.config import Config
from moeconv.checkpoint.header import StoredTensor
from moeconv.errors import ConfigMismatch, MixedLayouts, MoeconvError, quoted
from moeconv.layout.recipe import COMPANIONS, WEIGHT, WEIGHTS, Ids, Layout, Recipe, TensorTemplate

ComponentKey: TypeAlias = tuple[str, str]  # name template and component
SHARED = -1  # the expert id of a tensor that holds all experts


@dataclass(slots=True)
class MatchedStack:
    """The tensors whose names belong to one stack, by component and expert id.

    tensors: those that the recipe knows; unknown: those that only begin like one of its names.
    """

    name: str
    recipe: Recipe
    files: tuple[str, ...]
    tensors: dict[ComponentKey, dict[int, StoredTensor]] = field(default_factory=dict)
    unknown: list[StoredTensor] = field(default_factory=list)

    @property
    def passthrough(self) -> str | None:
        """The component because of which this stack is copied as it is, if it has one."""
        return next((c for _, c in self.tensors if c in self.recipe.passed), None)

    @property
    def templates(self) -> set[str]:
        """The name templates that occur."""
        return {template for template, _ in self.tensors}

    @property
    def components(self) -> set[str]:
        """The names of the components that occur."""
        return {component for _, component in self.tensors}

    @property
    def all_tensors(self) -> list[StoredTensor]:
        """Every tensor of the stack, unknown ones included."""
        return [t for by_expert in self.tensors.values() for t in by_expert.values()] + self.unknown

    def weights(self, template: str) -> dict[int, StoredTensor]:
        """The weight tensors of a template by expert, whichever component they are."""
        out: dict[int, StoredTensor] = {}
        for component in self.recipe.weights:
            out |= self.tensors.get((template, component), {})
        return out

    def sample(self, key: ComponentKey | None = None) -> StoredTensor:
        """Return one tensor of a component, or without `key` of the stack."""
        if key is None:
            return next((self.sample(key) for key in self.tensors), None) or self.unknown[0]
        return next(iter(self.tensors[key].values()))

    def samples(self) -> dict[ComponentKey, StoredTensor]:
        """Return one tensor of each component."""
        return {key: self.sample(key) for key in self.tensors}

    def tensor_of(self, expert: int) -> StoredTensor:
        """Return one tensor of an expert that has any."""
        return next(t[expert] for t in self.tensors.values() if expert in t)

    def where(self, *tensors: StoredTensor) -> str:
        """Return file and name of tensors: in a checkpoint of 160 shards a name is not enough."""
        return ", ".join(f"{quoted(self.files[t.file])}, tensor {quoted(t.name)}" for t in tensors)


@dataclass(frozen=True, slots=True)
class _Rest:
    """What follows a stack's name: a known tensor, or one of an unknown kind (empty template)."""

    template: str
    component: str
    expert: int


class _Matcher:
    """One recipe's names as regular expressions, with a memo: stacks repeat what follows them."""

    def __init__(self, recipe: Recipe) -> None:
        self.recipe = recipe
        lines = {line.template: line for layout in recipe.layouts for line in layout.lines}
        self._lines = lines
        # compiled on first use: most names match the first one
        self._patterns: dict[str, tuple[re.Pattern[str], dict[str, str]]] = {}
        stems = "|".join(line.stem() for line in lines.values())
        # where a stack ends in the layer's number, what follows distinguishes it from other numbers
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
            return None  # an expert of another stack
        return _Rest("", "", SHARED) if self._stem.match(rest) else None

    def _pattern(
        self, template: str, line: TensorTemplate
    ) -> tuple[re.Pattern[str], dict[str, str]]:
        """A template's regular expression, and its components by their words."""
        if template not in self._patterns:
            text = line.pattern(self.recipe.components, self.recipe.passed)
            by_word = {line.word(c): c.name for c in self.recipe.components}
            self._patterns[template] = re.compile(text, re.ASCII), by_word
        return self._patterns[template]


_Hit: TypeAlias = tuple[_Matcher, tuple[str, _Rest]]


def match_names(
    tensors: Iterable[StoredTensor],
    recipes: tuple[Recipe, ...],
    files: tuple[str, ...],
    *,
    owners: dict[str, str],
) -> tuple[dict[str, MatchedStack], tuple[StoredTensor, ...]]:
    """Return the stacks that these tensors form by their names, and the tensors of none.

    A name belongs to the recipe that `owners` has for its stack, otherwise to the first recipe that
    knows it. A name that only begins like an expert's is kept with its stack as unknown, so that
    it is reported.
    """
    matchers = [_Matcher(recipe) for recipe in recipes]
    stacks: dict[str, MatchedStack] = {}
    others: list[StoredTensor] = []
    for tensor in tensors:
        hits = [(m, hit) for m in matchers if (hit := m.split(tensor.name))]
        if not hits:
            others.append(tensor)
            continue
        matcher, (stack, rest) = hits[0] if len(hits) == 1 else _owner(hits, owners)
        matched = stacks.get(stack)
        if matched is None:
            matched = stacks[stack] = MatchedStack(stack, matcher.recipe, files)
        if rest.template:
            matched.tensors.setdefault((rest.template, rest.component), {})[rest.expert] = tensor
        else:
            matched.unknown.append(tensor)
    return stacks, tuple(others)


def _owner(hits: list[_Hit], owners: dict[str, str]) -> _Hit:
    owned = [(m, hit) for m, hit in hits if owners.get(hit[0]) == m.recipe.name]
    return next(((m, hit) for m, hit in (*owned, *hits) if hit[1].template), hits[0])


def in_ranges(recipes: tuple[Recipe, ...], config: Config) -> tuple[Recipe, ...]:
    """Return the recipes with the ranges of expert ids that config.json states for them."""
    return tuple(_in_range(recipe, config) for recipe in recipes)


def _in_range(recipe: Recipe, config: Config) -> Recipe:
    if recipe.ids is None or recipe.taken:
        return recipe
    first = _number(recipe.ids.first, config) if recipe.ids.first else 0
    stop = _number(recipe.ids.stop, config)
    if first is None or (recipe.ids.stop and stop is None):
        return recipe
    return recipe.taking(first, stop)


def _number(paths: tuple[str, ...], config: Config) -> int | None:
    """Return the first positive number at one of the keys, in text_config or at the top."""
    for path in (f"{section}{p}" for section in ("text_config.", "") for p in paths):
        value = config.at(path)
        if type(value) is int and value > 0:
            return value
    return None


def no_range(matched: MatchedStack, ids: Ids) -> MoeconvError:
    """Return the problem that config.json does not state where one kind of experts ends."""
    return ConfigMismatch(
        f"{quoted(matched.name)} shares its expert ids with another stack, "
        "but config.json does not state where its own ids end",
        at=f"config.json, key {quoted((*ids.first, *ids.stop)[0])}",
        cause="text and vision experts are numbered in one sequence",
    )


def candidate_layouts(matched: MatchedStack) -> list[Layout] | MoeconvError:
    """Return the layouts that have all names of the stack, or the problem that there is none."""
    present = matched.templates
    layouts = [layout for layout in matched.recipe.layouts if _names_fit(matched, layout)]
    if layouts:
        return layouts
    touched = [
        layout
        for layout in matched.recipe.layouts
        if present & {line.template for line in layout.lines} and not layout.in_parts
    ]
    samples = {template: matched.sample((template, c)) for template, c in sorted(matched.tensors)}
    duplicate = _duplicate(matched)
    return MixedLayouts(
        "one expert stack is stored in two layouts at once",
        at=matched.where(*list(samples.values())[:4]),
        cause=f"its names belong to the layouts {', '.join(quoted(t.name) for t in touched)}"
        + (f"; {quoted(duplicate.name)} is in both" if duplicate else "; no tensor is in both"),
        fix="keep only one of the two in the directory; moeconv cannot know which one is right"
        if duplicate
        else "remove neither, since each holds what the other lacks; save the checkpoint again "
        "in one layout",
    )


def _duplicate(matched: MatchedStack) -> StoredTensor | None:
    """Return a tensor whose matrices other tensors hold as well, if there is one."""
    lines = {ln.template: ln for la in matched.recipe.layouts for ln in la.lines if not ln.part}
    seen: set[tuple[str, str, int]] = set()
    for (template, component), tensors in matched.tensors.items():
        kind = WEIGHT if component in matched.recipe.weights else component
        mine = {(p, kind, e) for p in lines[template].projections for e in tensors}
        for projection, _, expert in mine:
            whole = {(projection, kind, SHARED), (projection, kind, expert)}
            if seen & whole or (
                expert == SHARED and any((projection, kind) == one[:2] for one in seen)
            ):
                return tensors[expert]
        seen |= mine
    return None


def _names_fit(matched: MatchedStack, layout: Layout) -> bool:
    """Whether all names are of a layout; a layout in parts needs names of both."""
    present = set(matched.tensors)
    if not layout.in_parts:
        return matched.templates <= {line.template for line in layout.lines}
    parts = [
        {
            (ln.template, c.name)
            for ln in layout.lines
            if ln.part == p
            for c in matched.recipe.components
            if ln.holds(c)
        }
        for p in (WEIGHTS, COMPANIONS)
    ]
    return present <= parts[0] | parts[1] and all(present & part for part in parts)
