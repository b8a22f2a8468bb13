"""The readings of a stack's tensors: axes that a name leaves open, to be tried on the shapes.

`weight_scale` is one number, one for each row, or one for each group of 16 or 32: which of these
is decided by the axes that fit all tensors of the stack together.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import product
from math import prod
from typing import Final

from moeconv.detect.match import Found
from moeconv.errors import BadRecipe, quoted
from moeconv.layout.axes import Axes
from moeconv.layout.recipe import DOWN, Component, Layout, Line

_MAX_READINGS: Final = 20_000
Key = tuple[str, str]  # template and component
Reading = dict[Key, tuple[Component, Axes]]


def granule_names(found: Found, layouts: list[Layout]) -> dict[str, str]:
    """The named granules in the readings of what is there, each with a component that needs it.

    Readings of another number of dimensions are none: nobody need say a block size for scales
    that are one number.
    """
    names: dict[str, str] = {}
    for layout in layouts:
        for line, component in held(found, layout):
            for axes in component.readings:
                for form in line.forms(component.read_as(axes)):
                    if same_rank(found, (line.template, component.name), form):
                        names.update(dict.fromkeys(form.granules, component.name))
    return names


def readings(
    found: Found, layout: Layout, granules: dict[str, int], *, only: frozenset[str] | None = None
) -> list[Reading]:
    """All readings of the tensors in `layout`, the recipe's first choices first.

    granules: the numbers of those that config.json says; readings that need others are left out.
    only: of these components, as if there were no others.
    """
    groups: dict[tuple[str, bool], list[tuple[Line, Component]]] = {}
    for line, component in held(found, layout):
        if only is not None and component.name not in only:
            continue
        # down may be of another precision than gate and up; scales of one name are of one kind
        side = component.weight and line.projections == (DOWN,)
        groups.setdefault((component.name, side), []).append((line, component))
    choices = [list(_choices(found, members, granules)) for members in groups.values()]
    count = prod(map(len, choices))
    if count > _MAX_READINGS:
        raise BadRecipe(
            f"recipe {quoted(found.recipe.name)} leaves too much open",
            at=found.place(found.all()[0]),
            cause=f"its components can be read in {count:,} ways together, "
            f"more than {_MAX_READINGS:,} are not tried",
            fix="leave under `axes` of each component what it can really be",
        )
    return [{k: v for part in picked for k, v in part.items()} for picked in product(*choices)]


def bound(reading: Reading) -> dict[Key, Axes]:
    """The axes alone: two of a component's may be one, once their granules have numbers."""
    return {key: axes for key, (_, axes) in reading.items()}


def turned_about(options: list[Reading], chosen: Reading) -> Iterator[Reading]:
    """The readings that differ from the chosen one in nothing but the order of axes.

    Where such a one fits, too, the bytes would go elsewhere, and nothing here says which is right.
    """
    for other in options:
        pairs = [(chosen[key], other[key]) for key in chosen]
        alike = all(
            one.axes == two.axes and sorted(map(str, a.flat)) == sorted(map(str, b.flat))
            for (one, a), (two, b) in pairs
        )
        if alike and any(a != b for (_, a), (_, b) in pairs):
            yield other


def held(found: Found, layout: Layout) -> Iterator[tuple[Line, Component]]:
    """The lines and components of a layout that are there."""
    for line in layout.lines:
        for component in found.recipe.components:
            if found.tensors.get((line.template, component.name)):
                yield line, component


def _choices(
    found: Found, members: list[tuple[Line, Component]], granules: dict[str, int]
) -> Iterator[Reading]:
    """The readings of one component's tensors that have as many dimensions as these."""
    known = [r for r in _forms(members) if _bindable(r, granules) and _packable(found, r)]
    fitting = [r for r in known if all(same_rank(found, key, a) for key, (_, a) in r.items())]
    for reading in fitting or known[:1]:
        yield {key: (c, axes.bound(granules)) for key, (c, axes) in reading.items()}


def _forms(members: list[tuple[Line, Component]]) -> Iterator[Reading]:
    for axes in members[0][1].readings:
        read = [(line, component.read_as(axes)) for line, component in members]
        forms = [line.forms(component) for line, component in read]
        for n in range(max(map(len, forms))):
            yield {
                (line.template, component.name): (component, options[min(n, len(options) - 1)])
                for (line, component), options in zip(read, forms, strict=True)
            }


def _bindable(reading: Reading, granules: dict[str, int]) -> bool:
    return all(axes.granules <= granules.keys() for _, axes in reading.values())


def _packable(found: Found, reading: Reading) -> bool:
    """Only integers hold several values: half a matrix of BF16 is no packed one."""
    return all(
        not component.weight
        or all(axis.granule == 1 for axis in axes.flat)
        or next(iter(found.tensors[key].values())).dtype.startswith(("I", "U"))
        for key, (component, axes) in reading.items()
    )


def same_rank(found: Found, key: Key, axes: Axes) -> bool:
    """Whether a tensor has as many dimensions as these axes."""
    return len(axes.dims) == len(next(iter(found.tensors[key].values())).shape)
