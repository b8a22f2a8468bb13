"""Interpretations of a stack's tensors: the axes to try where a name leaves them open.

`weight_scale` is one number, one for each row, or one for each group of 16 or 32 values: the
axes that fit all tensors of the stack together decide.
"""

from __future__ import annotations

from collections.abc import Container, Iterator
from itertools import product
from math import prod
from typing import Final, TypeAlias

from moeconv.detect.match import ComponentKey, MatchedStack
from moeconv.errors import BadRecipe, quoted
from moeconv.layout.axes import EXPERT, PAIR, Axes
from moeconv.layout.recipe import Component, Layout, TensorTemplate
from moeconv.manifest.model import Manifest

_MAX_INTERPRETATIONS: Final = 20_000

BlockSizes: TypeAlias = dict[str, int]  # by the name that the recipe gives them
Interpretation: TypeAlias = dict[ComponentKey, tuple[Component, Axes]]
# number of dimensions of a canonical matrix, by (stack, projection, component)
RecordedDims: TypeAlias = dict[tuple[str, str, str], int]


def present_components(
    matched: MatchedStack, layout: Layout, *, only: Container[str] | None = None
) -> Iterator[tuple[TensorTemplate, Component]]:
    """Yield the lines and components of a layout that have tensors.

    only: the names of the components to look at, as if there were no others.
    """
    for line in layout.lines:
        for component in matched.recipe.components:
            wanted = only is None or component.name in only
            if wanted and matched.tensors.get((line.template, component.name)):
                yield line, component


def named_block_sizes(
    matched: MatchedStack, layout: Layout, *, only: Container[str] | None = None
) -> set[str]:
    """Return the names of the block sizes in the axes that the stack's tensors may have.

    Axes of another rank than the tensor are left out: scales that are one number need no block
    size. only: see `present_components`.
    """
    return {
        name
        for line, component in present_components(matched, layout, only=only)
        for axes in component.possible_axes
        for form in line.forms(component.read_as(axes))
        if _same_dims(matched, (line.template, component.name), form)
        for name in form.block_names
    }


def interpretations(
    matched: MatchedStack,
    layout: Layout,
    block_sizes: BlockSizes,
    *,
    only: Container[str] | None = None,
) -> list[Interpretation]:
    """Return all interpretations of the tensors in `layout`, the recipe's first choices first.

    block_sizes: those that config.json states; interpretations that need others are left out.
    only: see `present_components`.
    Raises BadRecipe if there are too many to try.
    """
    groups: dict[tuple[str, bool], list[tuple[TensorTemplate, Component]]] = {}
    for line, component in present_components(matched, layout, only=only):
        # down may have another precision than gate and up; scales of one name are of one kind
        separate_down = component.weight and line.is_down
        groups.setdefault((component.name, separate_down), []).append((line, component))
    choices = [list(_choices(matched, members, block_sizes)) for members in groups.values()]
    count = prod(map(len, choices))
    if count > _MAX_INTERPRETATIONS:
        raise BadRecipe(
            f"recipe {quoted(matched.recipe.name)} has too many possible interpretations",
            at=matched.where(matched.sample()),
            cause=f"its components allow {count:,} combinations of axes; "
            f"at most {_MAX_INTERPRETATIONS:,} are tried",
            fix="list under `axes` of each component only those that it can really have",
        )
    return [{k: v for part in picked for k, v in part.items()} for picked in product(*choices)]


def axes_of(interpretation: Interpretation) -> dict[ComponentKey, Axes]:
    """Return the axes alone: two that differ in the recipe may be equal with block sizes bound."""
    return {key: axes for key, (_, axes) in interpretation.items()}


def transposed_variants(
    options: list[Interpretation], chosen: Interpretation
) -> Iterator[Interpretation]:
    """Yield the options that differ from the chosen one in nothing but the order of axes.

    If one of these fits as well, bytes would go elsewhere, and the shapes do not tell which of
    the two is right.
    """
    for other in options:
        pairs = [(chosen[key], other[key]) for key in chosen]
        alike = all(
            one.axes == two.axes and sorted(map(str, a.flat)) == sorted(map(str, b.flat))
            for (one, a), (two, b) in pairs
        )
        if alike and any(a != b for (_, a), (_, b) in pairs):
            yield other


def recorded_dims(manifest: Manifest) -> RecordedDims:
    """Return the number of dimensions of the canonical matrices that a manifest records."""
    stacks = manifest.root.stacks
    return {
        (stacks[expert.stack].name, projection, expert.component): len(expert.matrix)
        for part in manifest.parts
        for tensor in part.tensors
        if (expert := tensor.expert) is not None
        for projection in expert.projections
    }


def recorded_first(
    options: list[Interpretation], layout: Layout, stack: str, recorded: RecordedDims
) -> list[Interpretation]:
    """Sort interpretations so that those with the recorded numbers of dimensions come first.

    A grid of one block has the same shape as one number; only the record distinguishes them.
    """
    projections = {line.template: line.projections[0] for line in layout.lines}

    def mismatches(interpretation: Interpretation) -> int:
        dims = {
            key: len(axes.letters - {EXPERT, PAIR}) for key, (_, axes) in interpretation.items()
        }
        return sum(
            recorded.get((stack, projections[template], name), count) != count
            for (template, name), count in dims.items()
        )

    return sorted(options, key=mismatches)


def _choices(
    matched: MatchedStack, members: list[tuple[TensorTemplate, Component]], block_sizes: BlockSizes
) -> Iterator[Interpretation]:
    """Yield the interpretations of one component that have the rank of its tensors.

    If there is none, the first one of any rank, so that messages have axes to show.
    """
    known = [
        i
        for i in _forms(members)
        if all(axes.block_names <= block_sizes.keys() for _, axes in i.values())
        and _packable(matched, i)
    ]
    fitting = [i for i in known if all(_same_dims(matched, key, a) for key, (_, a) in i.items())]
    for interpretation in fitting or known[:1]:
        yield {key: (c, axes.bound(block_sizes)) for key, (c, axes) in interpretation.items()}


def _forms(members: list[tuple[TensorTemplate, Component]]) -> Iterator[Interpretation]:
    """Yield the interpretations of one component, block sizes still by name."""
    for axes in members[0][1].possible_axes:
        read = [(line, component.read_as(axes)) for line, component in members]
        forms = [line.forms(component) for line, component in read]
        for n in range(max(map(len, forms))):
            yield {
                (line.template, component.name): (component, options[min(n, len(options) - 1)])
                for (line, component), options in zip(read, forms, strict=True)
            }


def _packable(matched: MatchedStack, interpretation: Interpretation) -> bool:
    """Whether the dtypes allow it: only integers pack several values, BF16 never does."""
    return all(
        not component.weight
        or not axes.in_blocks
        or matched.sample(key).dtype.startswith(("I", "U"))
        for key, (component, axes) in interpretation.items()
    )


def _same_dims(matched: MatchedStack, key: ComponentKey, axes: Axes) -> bool:
    """Whether a component's tensors have as many dimensions as these axes."""
    return len(axes.dims) == len(matched.sample(key).shape)
