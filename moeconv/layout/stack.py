"""An expert stack: its sizes, the layout it is stored in, and the tensors that hold it."""

from __future__ import annotations

from dataclasses import dataclass

from moeconv.checkpoint.header import StoredTensor
from moeconv.layout.axes import EXPERT, IN, OUT, PAIR, Axes, Geometry, geometry
from moeconv.layout.recipe import DOWN, Component, Layout, Line, Recipe


@dataclass(frozen=True, slots=True)
class Sizes:
    """E experts, I width, H hidden; `packing` sizes by (component, is_down, letter)."""

    experts: int
    width: int
    hidden: int
    packing: tuple[tuple[tuple[str, bool, str], int], ...] = ()

    def of(self, line: Line, component: str) -> dict[str, int]:
        """The size of every letter in a line's tensors: gate and up are [I, H], down is [H, I]."""
        down = line.projections == (DOWN,)
        letters = {
            EXPERT: self.experts,
            PAIR: len(line.projections),
            OUT: self.hidden if down else self.width,
            IN: self.width if down else self.hidden,
        }
        for (owner, is_down, letter), size in self.packing:
            if owner == component and is_down == down:
                letters[letter] = size
        return letters


@dataclass(frozen=True, slots=True)
class Member:
    """The tensors of one line and component: one for each expert, or a single one."""

    line: Line
    component: Component
    dtype: str
    axes: Axes
    geometry: Geometry
    tensors: tuple[StoredTensor, ...]

    def tensor(self, expert: int) -> StoredTensor:
        """The tensor that holds this expert."""
        return self.tensors[expert] if self.line.per_expert else self.tensors[0]


@dataclass(frozen=True, slots=True)
class Stack:
    """One stack of routed experts, found complete and consistent."""

    name: str
    recipe: Recipe
    layout: Layout
    sizes: Sizes
    granules: tuple[tuple[str, int], ...]
    members: tuple[Member, ...]

    @property
    def tensors(self) -> tuple[StoredTensor, ...]:
        """All stored tensors of the stack."""
        return tuple(t for m in self.members for t in m.tensors)

    @property
    def components(self) -> tuple[str, ...]:
        """The names of the components that are there, in the recipe's order."""
        held = {m.component.name for m in self.members}
        return tuple(c.name for c in self.recipe.components if c.name in held)

    def member(self, projection: str, component: str) -> Member | None:
        """The tensors that hold a projection's component."""
        for m in self.members:
            if m.component.name == component and projection in m.line.projections:
                return m
        return None

    def axes_in(self, line: Line, component: Component) -> Axes:
        """The axes that a component has in a line of any of the family's layouts."""
        return line.component_axes(component).bound(dict(self.granules))

    def geometry_in(self, line: Line, component: Component) -> Geometry:
        """The geometry that a component has in a line of any of the family's layouts."""
        return geometry(self.axes_in(line, component), self.sizes.of(line, component.name))
