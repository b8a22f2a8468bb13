"""Solve a stack's sizes from its shapes under one layout, or say why the shapes contradict it."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Final, TypeAlias

from moeconv.checkpoint.header import StoredTensor
from moeconv.core.text import counted
from moeconv.detect.interpretations import Interpretation
from moeconv.detect.match import MatchedStack
from moeconv.detect.stack import PackingAxis, Sizes
from moeconv.errors import quoted
from moeconv.layout.axes import EXPERT, IN, OUT, PAIR, Axes, Axis
from moeconv.layout.recipe import Component, Layout, TensorTemplate

EXPERTS: Final = "experts"
WIDTH: Final = "width"
HIDDEN: Final = "hidden"

_Variable: TypeAlias = str | PackingAxis  # EXPERTS, WIDTH, HIDDEN, or a packing axis


@dataclass(frozen=True, slots=True)
class SizeHints:
    """What is known of a stack's sizes beside the shapes.

    experts: E by the ids in the names, where each expert has a tensor of its own.
    stated: sizes that config.json or the manifest states, used only where shapes leave one open.
    """

    experts: int | None
    stated: dict[str, int]


@dataclass(frozen=True, slots=True)
class _Equation:
    """One dimension of a stored tensor: its size is `factor` times the product of the terms.

    terms: each a variable and its block size b, which stands for ceil(variable / b).
    """

    tensor: StoredTensor
    axes: Axes
    size: int
    factor: int
    terms: tuple[tuple[_Variable, int], ...]

    def open_terms(self, values: dict[_Variable, int]) -> list[tuple[_Variable, int]]:
        """The terms whose variables have no value yet."""
        return [term for term in self.terms if term[0] not in values]

    def product(self, values: dict[_Variable, int], without: _Variable | None = None) -> int:
        """The right-hand side, of all terms or of all but one variable's."""
        total = self.factor
        for variable, block in self.terms:
            if variable != without:
                total *= -(-values[variable] // block)
        return total


def solve(
    matched: MatchedStack, layout: Layout, interpretation: Interpretation, hints: SizeHints
) -> Sizes | list[str]:
    """Solve E, I, H and the packing axes of a stack stored in `layout` with these axes.

    Returns the reasons why no sizes fit all shapes, if none do.
    """
    reasons: list[str] = []
    equations = list(_equations(matched, layout, interpretation, reasons))
    values: dict[_Variable, int] = {} if hints.experts is None else {EXPERTS: hints.experts}
    if reasons or not _propagate(equations, values, reasons):
        return reasons
    for name in (EXPERTS, WIDTH, HIDDEN):
        if name not in values and name in hints.stated:
            values[name] = hints.stated[name]
            if not _propagate(equations, values, reasons):
                return reasons
    for equation in equations:
        if unsolved := equation.open_terms(values):
            reasons.append(f"{layout.name}: nothing determines the size of `{unsolved[0][0]}`")
        elif (needed := equation.product(values)) != equation.size:
            reasons.append(
                f"{layout.name}: {quoted(equation.tensor.name)} is {list(equation.tensor.shape)}, "
                f"but `{equation.axes}` needs {needed} instead of {equation.size}"
            )
    if not reasons and values[EXPERTS] < 1:
        reasons.append(f"{layout.name}: there are no experts in these tensors")
    if reasons:
        return reasons
    packing = sorted((axis, size) for axis, size in values.items() if not isinstance(axis, str))
    return Sizes(values[EXPERTS], values[WIDTH], values[HIDDEN], tuple(packing))


def _equations(
    matched: MatchedStack, layout: Layout, interpretation: Interpretation, reasons: list[str]
) -> Iterator[_Equation]:
    """One equation for each dimension; tensors that cannot fit are added to `reasons`."""
    square = tuple((layout.square or "").split("_"))
    for line in layout.lines:
        for name in (c.name for c in matched.recipe.components):
            if (line.template, name) not in interpretation:
                continue
            tensor = matched.sample((line.template, name))
            component, axes = interpretation[line.template, name]
            if len(axes.dims) != len(tensor.shape):
                reasons.append(
                    f"{layout.name}: {quoted(tensor.name)} is {list(tensor.shape)}, but `{axes}` "
                    f"has {counted(len(axes.dims), 'dimension')}"
                )
                continue
            if layout.square and line.projections == square and len(set(tensor.shape[-2:])) != 1:
                reasons.append(f"{layout.name}: {quoted(tensor.name)} is not square")
                continue
            for dim, size in zip(axes.dims, tensor.shape, strict=True):
                factor = len(line.projections) if any(a.letter == PAIR for a in dim) else 1
                terms = tuple(
                    (_variable(a, line, component), a.block) for a in dim if a.letter != PAIR
                )
                yield _Equation(tensor, axes, size, factor, terms)


def _variable(axis: Axis, line: TensorTemplate, component: Component) -> _Variable:
    if axis.letter == EXPERT:
        return EXPERTS
    if axis.letter in (OUT, IN):
        return HIDDEN if (axis.letter == OUT) == line.is_down else WIDTH
    return PackingAxis(component.name, line.is_down, axis.letter)


def _propagate(
    equations: list[_Equation], values: dict[_Variable, int], reasons: list[str]
) -> bool:
    """Solve equations with one unknown until there are none; False if one has no whole solution."""
    progress = True
    while progress:
        progress = False
        for equation in equations:
            unknown = equation.open_terms(values)
            if len(unknown) != 1 or unknown[0][1] != 1:
                continue
            variable = unknown[0][0]
            rest = equation.product(values, without=variable)
            if rest == 0 or equation.size % rest:
                reasons.append(
                    f"{quoted(equation.tensor.name)} is {list(equation.tensor.shape)}: "
                    f"{equation.size} is not divisible by {rest} (`{equation.axes}`)"
                )
                return False
            values[variable] = equation.size // rest
            progress = True
    return True
