"""An expert stack: its sizes, the layout it is stored in, and the tensors that hold it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

from moeconv.checkpoint.header import StoredTensor
from moeconv.core.dtypes import BITS
from moeconv.layout.axes import EXPERT, IN, OUT, PAIR, Axes, Geometry
from moeconv.layout.recipe import Component, Layout, Recipe, TensorTemplate
from moeconv.layout.region import ProjectionRegions, Region


class PackingAxis(NamedTuple):
    """An axis of packed values: of one component, of down or of gate and up."""

    component: str
    is_down: bool
    letter: str

    def __str__(self) -> str:
        return f"{self.letter} of {self.component}"


@dataclass(frozen=True, slots=True)
class Sizes:
    """The sizes of a stack: E experts, I width, H hidden, and those of its packing axes."""

    experts: int
    width: int
    hidden: int
    packing: tuple[tuple[PackingAxis, int], ...] = ()

    def of(
        self, line: TensorTemplate, component: str, experts: int | None = None
    ) -> dict[str, int]:
        """Return the size of every letter in a line's tensors: gate and up are [I, H], down [H, I].

        experts: how many are in the tensor, where it does not hold all of them.
        """
        letters = {
            EXPERT: self.experts if experts is None else experts,
            PAIR: len(line.projections),
            OUT: self.hidden if line.is_down else self.width,
            IN: self.width if line.is_down else self.hidden,
        }
        for axis, size in self.packing:
            if axis.component == component and axis.is_down == line.is_down:
                letters[axis.letter] = size
        return letters


@dataclass(frozen=True, slots=True)
class StoredComponent:
    """The tensors of one line and component: one for each expert, a single one, or one per rank.

    places: for each expert the number of the tensor that holds it and its position along E there,
    where these do not follow from the line.
    """

    line: TensorTemplate
    component: Component
    dtype: str
    axes: Axes
    geometry: Geometry
    tensors: tuple[StoredTensor, ...]
    places: tuple[tuple[int, int], ...] | None = None

    def region(self, expert: int) -> Region:
        """The region that holds this expert's matrices."""
        if self.places is not None:
            number, position = self.places[expert]
        elif self.line.per_expert:
            number, position = expert, 0
        else:
            number, position = 0, expert
        tensor, shape = self.tensors[number], self.geometry
        # E is outermost, so an expert is one run; a stride of 0: all experts share the tensor
        step = shape.expert_stride * BITS[self.dtype] // 8
        return Region(tensor.file, tensor.offset + position * step, shape)

    def regions(self, projection: str) -> ProjectionRegions:
        """The regions of one of the line's projections."""
        pair = self.line.projections.index(projection)
        return ProjectionRegions(self.region, self.geometry, pair)


@dataclass(frozen=True, slots=True)
class Stack:
    """One stack of routed experts, found complete and consistent."""

    name: str
    recipe: Recipe
    layout: Layout
    sizes: Sizes
    block_sizes: tuple[tuple[str, int], ...]
    members: tuple[StoredComponent, ...]

    @property
    def tensors(self) -> tuple[StoredTensor, ...]:
        """All stored tensors of the stack."""
        return tuple(t for m in self.members for t in m.tensors)

    @property
    def components(self) -> tuple[str, ...]:
        """The names of the components that are there, in the recipe's order."""
        present = {m.component.name for m in self.members}
        return tuple(c.name for c in self.recipe.components if c.name in present)

    def member(self, projection: str, component: str) -> StoredComponent | None:
        """Return the tensors that hold a projection's component, or None if it has none."""
        for m in self.members:
            if m.component.name == component and projection in m.line.projections:
                return m
        return None

    def axes_in(self, line: TensorTemplate, component: Component) -> Axes:
        """Return the axes that a component has in a line of any of the family's layouts."""
        for m in self.members:
            here = m.component.name == component.name and m.line.template == line.template
            if here and m.line.axes == line.axes:
                return m.axes  # the recipe may allow several; these are stored
        return line.component_axes(component).bound(dict(self.block_sizes))
