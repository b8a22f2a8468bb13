"""What the output will hold, before anything has a place: one draft for each output tensor."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import chain

from moeconv.checkpoint.dtypes import BITS
from moeconv.checkpoint.header import StoredTensor
from moeconv.errors import StraddlingBlock, quoted
from moeconv.layout.axes import EXPERT, PAIR, Axes, Geometry
from moeconv.layout.recipe import Component, Layout, Line
from moeconv.layout.stack import Member, Stack
from moeconv.manifest import ExpertEntry
from moeconv.plan.values import Fate


@dataclass(frozen=True, slots=True)
class Woven:
    """Where a draft's bytes come from: matrices of a stack, in the order of a target line.

    members: the holders of the line's projections; keys: for each position along the draft's E,
    the expert that the members are asked for.
    """

    members: tuple[Member, ...]
    keys: tuple[int, ...]
    axes: Axes
    geometry: Geometry
    expert: ExpertEntry


@dataclass(frozen=True, slots=True)
class Draft:
    """One output tensor; `woven` is None for a plain copy of `source`."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    nbytes: int
    source: StoredTensor | None
    woven: Woven | None


def copied(tensor: StoredTensor) -> Draft:
    """A tensor that is no expert's: as it is."""
    return Draft(tensor.name, tensor.dtype, tensor.shape, tensor.nbytes, tensor, None)


def laid_out(stack: Stack, number: int, layout: Layout) -> list[Draft]:
    """All output tensors of a stack in a layout. Raises StraddlingBlock.

    number: the stack's index in the manifest.
    """
    every = tuple(range(stack.sizes.experts))
    return [
        draft
        for line, component in lines_of(stack, layout)
        for draft in (
            [one_draft(stack, number, line, component, (e,)) for e in every]
            if line.per_expert
            else [one_draft(stack, number, line, component, every)]
        )
    ]


def lines_of(stack: Stack, layout: Layout) -> Iterator[tuple[Line, Component]]:
    """What a stack stores in a layout: each line with each component. Raises StraddlingBlock."""
    for line in layout.lines:
        for component in stack.recipe.components:
            member = stack.member(line.projections[0], component.name)
            if member is None:
                continue
            refuse_straddling(stack, member.line, component)
            refuse_straddling(stack, line, component)
            yield line, component


def one_draft(
    stack: Stack,
    number: int,
    line: Line,
    component: Component,
    experts: tuple[int, ...],
    *,
    slots: tuple[int, int] | None = None,
    name: str | None = None,
    local: str | None = None,
) -> Draft:
    """One output tensor that holds these experts.

    slots, local: as in the manifest; name: where it is not the one that the line gives it.
    """
    members = tuple(
        m for p in line.projections if (m := stack.member(p, component.name)) is not None
    )
    axes = stack.axes_in(line, component)
    geometry = stack.geometry_in(line, component, len(experts))
    expert = ExpertEntry(
        stack=number,
        experts=experts,
        projections=line.projections,
        component=component.name,
        axes=str(axes),
        matrix=geometry.canonical_shape,
        slots=slots,
        local=local,
    )
    return Draft(
        name=name or line.name(stack.name, component, experts[0] if line.per_expert else None),
        dtype=members[0].dtype,
        shape=geometry.shape,
        nbytes=geometry.numel * BITS[members[0].dtype] // 8,
        source=None,
        woven=Woven(members, experts, axes, geometry, expert),
    )


def refuse_straddling(stack: Stack, line: Line, component: Component) -> None:
    """A granule must not lie across two matrices: then its bytes belong to neither."""
    axes: Axes = stack.axes_in(line, component)
    sizes = stack.sizes.of(line, component.name)
    for dim in axes.dims:
        for place, axis in enumerate(dim):
            granule = axis.granule if isinstance(axis.granule, int) else 1
            if granule == 1 or not {a.letter for a in dim} & {EXPERT, PAIR}:
                continue
            size = sizes[axis.letter]
            if size % granule or place != len(dim) - 1:
                name = line.name(stack.name, component, 0 if line.per_expert else None)
                raise StraddlingBlock(
                    f"blocks of {granule} do not fit {quoted(name)}",
                    at=quoted(stack.name),
                    cause=f"each matrix has {size} rows; {size} is not a multiple of {granule}, "
                    f"so in `{axes}` one block would lie across two of them",
                    fix="keep this stack per-expert, or dequantise it first",
                )


def fates(stack: Stack, layout: Layout) -> list[Fate]:
    """What becomes of each of a stack's tensors in `layout`."""
    out = []
    every = range(stack.sizes.experts)
    for member in stack.members:
        held = set(member.line.projections)
        lines = [line for line in layout.lines if held & set(line.projections)]
        for number, tensor in enumerate(member.tensors):
            experts = [number] if member.line.per_expert else list(every)
            into = tuple(
                chain.from_iterable(
                    [line.name(stack.name, member.component, e) for e in experts]
                    if line.per_expert
                    else [line.name(stack.name, member.component, None)]
                    for line in lines
                )
            )
            verb = _verb(stack.layout, layout)
            if any(_shares(stack, line, member.component) for line in lines):
                verb = "shared"
            out.append(Fate(tensor.name, verb, into, tensor.nbytes))
    return out


def _shares(stack: Stack, line: Line, component: Component) -> bool:
    """Whether a line's tensor stores one value for several matrices."""
    letters = stack.axes_in(line, component).letters
    experts = not line.per_expert and stack.sizes.experts > 1 and EXPERT not in letters
    return experts or (len(line.projections) > 1 and PAIR not in letters)


def _verb(source: Layout, target: Layout) -> str:
    if source.name == target.name:
        return "copied"
    if source.per_expert:
        return "renamed" if target.per_expert else "fused"
    return "split" if target.per_expert else "rearranged"
