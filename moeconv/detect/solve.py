"""Solving a stack's sizes from its shapes under one layout, or saying why they contradict it."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

from moeconv.checkpoint.header import StoredTensor
from moeconv.detect.interpretations import Reading
from moeconv.detect.match import Found
from moeconv.detect.stack import Sizes
from moeconv.errors import quoted
from moeconv.layout.axes import EXPERT, IN, OUT, PAIR, Axes, Axis
from moeconv.layout.recipe import DOWN, Component, Layout, Line

_E, _I, _H = "experts", "width", "hidden"


@dataclass(frozen=True, slots=True)
class _Equation:
    """One dimension of one stored tensor: its size is the product of these axes."""

    tensor: StoredTensor
    axes: Axes
    size: int
    terms: tuple[tuple[str, int], ...]  # (variable, granule)


@dataclass(slots=True)
class Fit:
    """The outcome: sizes, or reasons against."""

    sizes: Sizes | None = None
    reasons: list[str] = field(default_factory=list)


def fit(
    found: Found,
    layout: Layout,
    *,
    reading: Reading,
    count: int | None,
    known: dict[str, int],
) -> Fit:
    """Solve E, I, H and the packing axes of a stack stored in `layout`, its axes as in `reading`.

    count: the number of per-expert names; known: sizes that config.json says, used only where
    the shapes alone leave one open.
    """
    out = Fit()
    equations = list(_equations(found, layout, reading, out))
    values: dict[str, int] = {} if count is None else {_E: count}
    if out.reasons or not _solve(equations, values, out):
        return out
    for name in (_E, _I, _H):
        if name not in values and name in known:
            values[name] = known[name]
            if not _solve(equations, values, out):
                return out
    for equation in equations:
        open_ones = [v for v, _ in equation.terms if v[0] != "#" and v not in values]
        if open_ones:
            out.reasons.append(f"{layout.name}: nothing says how large `{open_ones[0]}` is")
        elif (need := _product(equation, values)) != equation.size:
            out.reasons.append(_against(layout, equation, need))
    if not out.reasons and values[_E] < 1:
        out.reasons.append(f"{layout.name}: there are no experts in these tensors")
    if not out.reasons:
        out.sizes = _sizes(values, found, layout)
    return out


def _equations(found: Found, layout: Layout, reading: Reading, out: Fit) -> Iterator[_Equation]:
    for line in layout.lines:
        for name in (c.name for c in found.recipe.components):
            if (line.template, name) not in reading:
                continue
            tensor = next(iter(found.tensors[line.template, name].values()))
            component, axes = reading[line.template, name]
            if len(axes.dims) != len(tensor.shape):
                out.reasons.append(
                    f"{layout.name}: {quoted(tensor.name)} is {list(tensor.shape)}, `{axes}` has "
                    f"{len(axes.dims)} dimension(s)"
                )
                continue
            if layout.square and line.projections == _square(layout) and not _is_square(tensor):
                out.reasons.append(f"{layout.name}: {quoted(tensor.name)} is not square")
                continue
            for dim, size in zip(axes.dims, tensor.shape, strict=True):
                terms = tuple(
                    (_variable(a, line, component), a.granule if isinstance(a.granule, int) else 1)
                    for a in dim
                )
                yield _Equation(tensor, axes, size, terms)


def _square(layout: Layout) -> tuple[str, ...]:
    return tuple((layout.square or "").split("_"))


def _is_square(tensor: StoredTensor) -> bool:
    return len(set(tensor.shape[-2:])) == 1


def _variable(axis: Axis, line: Line, component: Component) -> str:
    down = line.projections == (DOWN,)
    if axis.letter == EXPERT:
        return _E
    if axis.letter == PAIR:
        return f"#{len(line.projections)}"
    if axis.letter in (OUT, IN):
        return _H if (axis.letter == OUT) == down else _I
    return f"{component.name} {int(down)} {axis.letter}"


def _known(variable: str, granule: int, values: dict[str, int]) -> int:
    if variable.startswith("#"):
        return int(variable[1:])
    return -(-values[variable] // granule)


def _product(equation: _Equation, values: dict[str, int]) -> int:
    total = 1
    for variable, granule in equation.terms:
        total *= _known(variable, granule, values)
    return total


def _solve(equations: list[_Equation], values: dict[str, int], out: Fit) -> bool:
    """Fill in what single-unknown dimensions determine; False where one has no whole solution."""
    progress = True
    while progress:
        progress = False
        for equation in equations:
            unknown = [
                (v, g) for v, g in equation.terms if not v.startswith("#") and v not in values
            ]
            if len(unknown) != 1 or unknown[0][1] != 1:
                continue
            rest = 1
            for variable, granule in equation.terms:
                if variable != unknown[0][0]:
                    rest *= _known(variable, granule, values)
            if rest == 0 or equation.size % rest:
                out.reasons.append(
                    f"{quoted(equation.tensor.name)} is {list(equation.tensor.shape)}: "
                    f"{equation.size} is not divisible by {rest} (`{equation.axes}`)"
                )
                return False
            values[unknown[0][0]] = equation.size // rest
            progress = True
    return True


def _against(layout: Layout, equation: _Equation, need: int) -> str:
    return (
        f"{layout.name}: {quoted(equation.tensor.name)} is {list(equation.tensor.shape)}, "
        f"`{equation.axes}` needs {need} where {equation.size} stands"
    )


def _sizes(values: dict[str, int], found: Found, layout: Layout) -> Sizes:
    packing = []
    for key, size in sorted(values.items()):
        if key not in (_E, _I, _H):
            component, down, letter = key.split(" ")
            packing.append(((component, down == "1", letter), size))
    return Sizes(values[_E], values[_I], values[_H], tuple(packing))
