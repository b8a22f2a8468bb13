"""A recipe as values: how a family names its expert stacks, and the layouts they come in."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Final

from moeconv.layout.axes import IN, OUT, Axes, derived

GATE: Final = "gate"
UP: Final = "up"
DOWN: Final = "down"
WEIGHT: Final = "weight"
_ID = r"(?:0|[1-9][0-9]{0,9})"  # ids of more digits are no ids


@dataclass(frozen=True, slots=True)
class Component:
    """One part of a projection: its own axes, and its suffix where names join projections."""

    name: str
    axes: Axes
    suffix: str

    @property
    def is_global(self) -> bool:
        """Whether it says one thing of a whole matrix: runtimes reduce it over all experts."""
        return not self.axes.letters & {OUT, IN}


@dataclass(frozen=True, slots=True)
class Line:
    """One stored tensor of a layout: name template, the projections it joins, the weight's axes.

    template: begins with `{stack}`; may hold `{expert}`, and `{component}` or `{suffix}`.
    projections: in the order in which they stand along G.
    overrides: axes of components that do not follow from the weight's.
    """

    projections: tuple[str, ...]
    template: str
    axes: Axes
    overrides: tuple[tuple[str, Axes], ...] = ()

    @property
    def per_expert(self) -> bool:
        """Whether each expert has a tensor of its own."""
        return "{expert}" in self.template

    def name(self, stack: str, component: Component, expert: int | None) -> str:
        """The tensor's name."""
        rest = self.template.replace("{component}", component.name)
        rest = rest.replace("{suffix}", component.suffix)
        if expert is not None:
            rest = rest.replace("{expert}", str(expert))
        return stack + rest.removeprefix("{stack}")

    def component_axes(self, component: Component) -> Axes:
        """The axes of a component's tensor, granules still by name."""
        if component.name == WEIGHT:
            return self.axes
        return dict(self.overrides).get(component.name) or derived(component.axes, self.axes)

    def pattern(self, components: tuple[Component, ...]) -> str:
        """A regular expression for what follows the stack's name, with groups e and c."""
        known = "|".join(
            re.escape(c.suffix if "{suffix}" in self.template else c.name)
            for c in sorted(components, key=lambda c: -len(c.name))
        )
        text = re.escape(self.template.removeprefix("{stack}"))
        text = text.replace(re.escape("{expert}"), f"(?P<e>{_ID})")
        for hole in ("{component}", "{suffix}"):
            text = text.replace(re.escape(hole), f"(?P<c>{known})")
        return text

    def stem(self) -> str:
        """A regular expression for the part of `pattern` that already commits a name to a stack."""
        text = self.template.removeprefix("{stack}")
        text = text.split("{component}")[0].split("{suffix}")[0]
        head, found, _ = text.partition("{expert}")
        return re.escape(head) + (r"[0-9]+\." if found else "")


@dataclass(frozen=True, slots=True)
class Layout:
    """One way to store a stack: a line for every stored tensor.

    square: for mixed-up files only; the layout is thought of only where that line's tensor is
    square, because only there has a program written it.
    """

    name: str
    lines: tuple[Line, ...]
    square: str | None = None

    @property
    def per_expert(self) -> bool:
        """Whether each expert has tensors of its own."""
        return all(line.per_expert for line in self.lines)

    @property
    def projections(self) -> tuple[str, ...]:
        """All projections, in the order of the lines."""
        return tuple(p for line in self.lines for p in line.projections)


@dataclass(frozen=True, slots=True)
class ConfigKeys:
    """Where config.json says the sizes: dotted paths, the first that is there counts.

    sections: for stacks whose name starts with the key, the objects of config.json to look in.
    granules: name -> dotted path of a granule.
    """

    experts: tuple[str, ...] = ()
    width: tuple[str, ...] = ()
    hidden: tuple[str, ...] = ()
    granules: tuple[tuple[str, tuple[str, ...]], ...] = ()
    sections: tuple[tuple[str, tuple[str, ...]], ...] = (("", ("",)),)

    def sections_of(self, stack: str) -> tuple[str, ...]:
        """The sections for a stack: those of the longest matching prefix."""
        fitting = [(p, s) for p, s in self.sections if stack.startswith(p)]
        return max(fitting, key=lambda item: len(item[0]))[1] if fitting else ("",)


@dataclass(frozen=True, slots=True)
class Recipe:
    """One family of layouts. `fuse` and `unfuse` name the layouts of the verbs of that name."""

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

    def layout(self, name: str) -> Layout | None:
        """The layout of that name."""
        return next((layout for layout in self.layouts if layout.name == name), None)

    def component(self, name: str) -> Component:
        """The component of that name, which must exist."""
        return next(c for c in self.components if c.name == name)

    @property
    def stack_pattern(self) -> str:
        """A regular expression for a stack's name."""
        text = "|".join(map(re.escape, self.stacks))
        text = text.replace(re.escape("{prefix}"), r"(?:.*\.)?")
        return f"(?:{text.replace(re.escape('{layer}'), _ID)})"
