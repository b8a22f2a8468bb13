"""A recipe as values: how a family names its expert stacks, and the layouts they come in."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from functools import cache
from typing import Final

from moeconv.core.names import slot_placeholder
from moeconv.layout.axes import EXPERT, IN, OUT, PAIR, Axes, derived, recounted, shared_by_pair

GATE: Final = "gate"
UP: Final = "up"
DOWN: Final = "down"
WEIGHT: Final = "weight"
WEIGHTS: Final = "weights"
COMPANIONS: Final = "companions"
HALF_APART: Final = "half-apart"
ANYTHING: Final = "anything"
MATRICES: Final = "matrices"  # weights with axes O and K only
PLAIN: Final = "plain"  # nothing packed, nothing counted in blocks
TAKES: Final = (ANYTHING, MATRICES, PLAIN)
SUFFIX: Final = "{suffix}"
PARAMETER: Final = "{parameter}"
_COMPONENT_PLACEHOLDERS: Final = ("{component}", PARAMETER, SUFFIX)
_ID = r"(?:0|[1-9][0-9]{0,9})"  # ids of more digits are no ids


@dataclass(frozen=True, slots=True)
class Component:
    """One component of a projection, such as `weight` or `weight_scale`, for one expert.

    axes: of one matrix, without E and G. suffix: what follows a name that joins projections.
    possible_axes: all that it may have, where a name alone is ambiguous; `axes` is one of them.
    weight: it is the matrix itself, not a companion of one.
    scales: quantised weights cannot be used without it. inputs: it describes an expert's inputs,
    so calibration may have skipped some layers. everywhere: all projections have it, or none.
    of: the formats that have it, for people.
    parameter: its name where names are those of an engine's parameters, if that is another one.
    note: what to say where it is fused; unequal: where gate's and up's differ in value.
    """

    name: str
    axes: Axes
    suffix: str
    possible_axes: tuple[Axes, ...]
    weight: bool = False
    scales: bool = False
    inputs: bool = False
    everywhere: bool = False
    of: str = ""
    note: str | None = None
    unequal: str | None = None
    parameter: str = ""

    def read_as(self, axes: Axes) -> Component:
        """This component with one of its possible axes."""
        return replace(self, axes=axes)

    @property
    def is_global(self) -> bool:
        """Whether it has one value for a whole matrix: runtimes reduce it over all experts."""
        return not self.axes.letters & {OUT, IN}


@dataclass(frozen=True, slots=True)
class TensorTemplate:
    """One stored tensor of a layout: name template, the projections it joins, the weight's axes.

    template: begins with `{stack}`; may hold `{expert}`, and `{component}`, `{parameter}` or
    `{suffix}`.
    projections: in their order along G.
    overrides: axes of components that do not follow from the weight's; of several, the first is
    written and all are read.
    first: the number in the names of expert 0, where a stack takes a range of ids.
    part: where a layout stores weights and companions under different names, which these are.
    """

    projections: tuple[str, ...]
    template: str
    axes: Axes
    overrides: tuple[tuple[str, tuple[Axes, ...]], ...] = ()
    first: int = 0
    part: str = ""

    def holds(self, component: Component) -> bool:
        """Whether tensors of a component are stored in this line."""
        return self.part == "" or (self.part == WEIGHTS) == component.weight

    @property
    def is_down(self) -> bool:
        """Whether it stores the down projection: [H, I], where gate and up are [I, H]."""
        return self.projections == (DOWN,)

    @property
    def per_expert(self) -> bool:
        """Whether each expert has a tensor of its own."""
        return "{expert}" in self.template

    def name(self, stack: str, component: Component, expert: int | None) -> str:
        """The tensor's name."""
        return self.namer(stack, component)(expert)

    def namer(
        self, stack: str, component: Component, *, slots_before: int | None = None
    ) -> Callable[[int | None], str]:
        """`name` for many experts: what they share is put together once.

        slots_before: for the slots of a rank instead, see `first_slot`.
        """
        rest = self.template
        if self.placeholder:
            rest = rest.replace(self.placeholder, self.word(component))
        text = stack + rest.removeprefix("{stack}")
        head, there, tail = text.partition("{expert}")
        if not there:
            return lambda _: text
        first = self.first if slots_before is None else self.first_slot(slots_before)
        return lambda expert: text if expert is None else f"{head}{first + expert}{tail}"

    def first_slot(self, before: int) -> int:
        """The number in the name of a rank's first slot, where each expert has a tensor.

        before: the most slots that a rank has of a stack whose ids come before in the same row of
        ids. Slots are numbered from where the ids of their stack begin, or behind these slots,
        which may be more than the ids before.
        """
        return max(self.first, before) if self.first else 0

    def slot_template(self, stack: str, component: Component, before: int) -> str:
        """The names of a rank's slots as the template that `names.slot_namer` reads."""
        return self.name(stack, component, None).replace(
            "{expert}", slot_placeholder(self.first_slot(before))
        )

    @property
    def placeholder(self) -> str:
        """The template's placeholder for the component; empty if it has none."""
        return next((p for p in _COMPONENT_PLACEHOLDERS if p in self.template), "")

    def word(self, component: Component) -> str:
        """What replaces that placeholder for a component."""
        if self.placeholder == SUFFIX:
            return component.suffix
        return (self.placeholder == PARAMETER and component.parameter) or component.name

    def component_axes(self, component: Component) -> Axes:
        """The axes in which a component's tensor is written, block sizes still by name."""
        return self.forms(component)[0]

    def forms(self, component: Component) -> tuple[Axes, ...]:
        """The axes that a component's tensor may have here, as `component.axes` reads it."""
        listed = next((axes for name, axes in self.overrides if name == component.name), ())
        return forms_of(self.axes, component.axes, listed, is_weight=component.name == WEIGHT)

    def pattern(self, components: tuple[Component, ...], passed: tuple[str, ...] = ()) -> str:
        """A regular expression for what follows the stack's name, with groups e and c."""
        names = [self.word(c) for c in components]
        names += () if self.placeholder == SUFFIX else passed
        known = "|".join(re.escape(n) for n in sorted(names, key=lambda n: -len(n)))
        text = re.escape(self.template.removeprefix("{stack}"))
        text = text.replace(re.escape("{expert}"), f"(?P<e>{_ID})")
        for placeholder in _COMPONENT_PLACEHOLDERS:
            text = text.replace(re.escape(placeholder), f"(?P<c>{known})")
        return text

    def stem(self) -> str:
        """A regular expression for the part of `pattern` that already commits a name to a stack."""
        text = self.template.removeprefix("{stack}")
        text = text.split(self.placeholder)[0] if self.placeholder else text
        head, found, _ = text.partition("{expert}")
        return re.escape(head) + (r"[0-9]+\." if found else "")


@cache
def forms_of(
    line: Axes, own: Axes, listed: tuple[Axes, ...], *, is_weight: bool
) -> tuple[Axes, ...]:
    """The axes that a component with `own` may have beside a weight of axes `line`.

    The first is written. One number for gate and up is read as well, from files that have it so.
    """
    if is_weight:
        return (recounted(line, own),)
    fitting = tuple(axes for axes in listed if matrix_axes(axes) == set(own.flat))
    if fitting:
        return fitting
    shared = shared_by_pair(own, line)
    return (derived(own, line), *([] if shared is None else [shared]))


def matrix_axes(axes: Axes) -> set[object]:
    """The axes of one matrix in a stored tensor: all but E and G."""
    return {a for a in axes.flat if a.letter not in (EXPERT, PAIR)}


@dataclass(frozen=True, slots=True)
class Layout:
    """One way to store a stack: a line for every stored tensor.

    takes: which experts may be written so, one of `TAKES`.
    square: for mixed-up files only; the layout is considered only where that line's tensor is
    square, because only there has a program written it.
    ask: why names like these are not enough to take a foreign file for it.
    """

    name: str
    lines: tuple[TensorTemplate, ...]
    square: str | None = None
    ask: str | None = None
    takes: str = ANYTHING

    @property
    def per_expert(self) -> bool:
        """Whether each expert has tensors of its own."""
        return all(line.per_expert for line in self.lines)

    @property
    def numbered(self) -> bool:
        """Whether there are names that say which expert a tensor is of."""
        return any(line.per_expert for line in self.lines)

    @property
    def in_parts(self) -> bool:
        """Whether weights and companions are stored under different names."""
        return any(line.part for line in self.lines)

    @property
    def read_only(self) -> bool:
        """Whether it is read but never written: a mistake of another program."""
        return self.square is not None or self.in_parts

    @property
    def weight_lines(self) -> tuple[TensorTemplate, ...]:
        """The lines that store weights."""
        return tuple(line for line in self.lines if line.part != COMPANIONS)

    @property
    def projections(self) -> tuple[str, ...]:
        """All projections, in the order of the lines."""
        return tuple(dict.fromkeys(p for line in self.lines for p in line.projections))


def half_apart(published: Layout, fused: Layout) -> Layout:
    """Weights as they are published, expert by expert for most, and their companions fused.

    So transformers saves fp8 experts that it holds fused: it takes apart what it joined.
    """
    weights = (replace(line, part=WEIGHTS) for line in published.lines)
    companions = (replace(line, part=COMPANIONS) for line in fused.lines)
    return Layout(HALF_APART, (*weights, *companions))


# where a model of several parts has the config of the one that speaks, and then the root
SECTIONS: Final = ("text_config", "language_config", "llm_config", "thinker_config.text_config", "")


@dataclass(frozen=True, slots=True)
class ConfigKeys:
    """Where config.json states the sizes: dotted paths, of which the first that exists counts.

    sections: for stacks whose name starts with the key, the objects of config.json to look in.
    block_sizes: name -> dotted paths of a block size.
    layers: for stacks whose name starts with the key, where sizes of single layers are stated:
    paths with `{layer}` and `{key}`.
    """

    experts: tuple[str, ...] = ()
    width: tuple[str, ...] = ()
    hidden: tuple[str, ...] = ()
    block_sizes: tuple[tuple[str, tuple[str, ...]], ...] = ()
    sections: tuple[tuple[str, tuple[str, ...]], ...] = (("", SECTIONS),)
    layers: tuple[tuple[str, tuple[str, ...]], ...] = ()

    @staticmethod
    def path(section: str, key: str) -> str:
        """The path of a key in a section; one that ends in `_` is the beginning of the key."""
        return f"{section}{'' if section.endswith('_') else '.'}{key}" if section else key

    def sections_of(self, stack: str) -> tuple[str, ...]:
        """The sections for a stack: those of the longest matching prefix."""
        return _longest(self.sections, stack)[1] or ("",)

    def layers_of(self, stack: str, *, restarts: bool) -> tuple[str, ...]:
        """The paths to sizes of a stack's layer alone.

        restarts: whether the stack's layers count from 0 again, as those of MTP do: sizes stated
        for the main layers are not theirs.
        """
        prefix, paths = _longest(self.layers, stack)
        return () if restarts and not prefix else paths


def _longest(
    by_prefix: tuple[tuple[str, tuple[str, ...]], ...], stack: str
) -> tuple[str, tuple[str, ...]]:
    """The longest prefix of a stack's name, and its value."""
    fitting = [item for item in by_prefix if stack.startswith(item[0])]
    return max(fitting, key=lambda item: len(item[0]), default=("", ()))


@dataclass(frozen=True, slots=True)
class Ids:
    """The range of expert ids that a stack takes: keys of config.json for its ends.

    first: none where it starts at 0; stop: none where it takes all the rest.
    """

    first: tuple[str, ...] = ()
    stop: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Recipe:
    """One family of layouts. `fuse` and `unfuse` name the layouts of the verbs of that name.

    passed: components that make a stack one that is copied as it is. varying: layers may differ in
    E. ids: where stacks share one row of expert ids; `taken` is the range, once config.json has
    told it.
    """

    name: str
    title: str
    model_types: tuple[str, ...]
    architectures: tuple[str, ...]
    stacks: tuple[str, ...]  # patterns of stack names
    config: ConfigKeys
    layouts: tuple[Layout, ...]
    components: tuple[Component, ...]
    fuse: str | None
    unfuse: str | None
    toml: str
    passed: tuple[str, ...] = ()
    varying: bool = False
    ids: Ids | None = None
    taken: tuple[int, int | None] | None = None

    def layout(self, name: str) -> Layout | None:
        """The layout of that name."""
        return next((layout for layout in self.layouts if layout.name == name), None)

    def component(self, name: str) -> Component | None:
        """The component of that name."""
        return next((c for c in self.components if c.name == name), None)

    @property
    def weights(self) -> tuple[str, ...]:
        """The names of the components that are matrices themselves."""
        return tuple(c.name for c in self.components if c.weight)

    def taking(self, first: int, stop: int | None) -> Recipe:
        """This recipe for stacks that take the ids from `first` on, up to `stop`."""
        layouts = tuple(
            replace(la, lines=tuple(replace(line, first=first) for line in la.lines))
            for la in self.layouts
        )
        return replace(self, layouts=layouts, taken=(first, stop))

    @property
    def shares_ids(self) -> bool:
        """Whether its stacks take the first ids of a row that goes on with another stack's."""
        return self.taken is not None and self.taken[0] == 0

    @property
    def stack_pattern(self) -> str:
        """A regular expression for a stack's name."""
        text = "|".join(map(re.escape, self.stacks))
        text = text.replace(re.escape("{prefix}"), r"(?:.*\.)?")
        return f"(?:{text.replace(re.escape('{layer}'), _ID)})"


def slots_before(stacks: Iterable[tuple[Recipe, tuple[int, ...] | None]], ep_size: int) -> int:
    """The most slots that a rank has of stacks that take the first ids of a shared row.

    stacks: each with its row of slots, if ranks share it.
    """
    rows = (row for recipe, row in stacks if row is not None and recipe.shares_ids)
    return max((len(row) // ep_size for row in rows), default=0)
