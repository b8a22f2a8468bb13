"""What the output will hold, before anything has a place: one draft for each output tensor."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import chain

from moeconv.checkpoint.dtypes import BITS
from moeconv.checkpoint.header import StoredTensor
from moeconv.errors import StraddlingBlock, quoted
from moeconv.layout.axes import EXPERT, PAIR, Axes, Geometry
from moeconv.layout.recipe import Component, Layout, Line
from moeconv.layout.stack import Stack
from moeconv.manifest import ExpertEntry
from moeconv.plan.values import Fate


@dataclass(frozen=True, slots=True)
class Woven:
    """Where a draft's bytes come from: matrices of a stack, in the order of a target line."""

    stack: Stack
    line: Line
    component: Component
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
    drafts = []
    for line in layout.lines:
        for component in stack.recipe.components:
            member = stack.member(line.projections[0], component.name)
            if member is None:
                continue
            refuse_straddling(stack, member.line, component)
            refuse_straddling(stack, line, component)
            axes = stack.axes_in(line, component)
            geometry = stack.geometry_in(line, component)
            nbytes = geometry.numel * BITS[member.dtype] // 8
            every = range(stack.sizes.experts)
            spans = [(e, e + 1) for e in every] if line.per_expert else [(0, len(every))]
            for span in spans:
                expert = span[0] if line.per_expert else None
                entry = ExpertEntry(
                    number,
                    span,
                    line.projections,
                    component.name,
                    str(axes),
                    geometry.canonical_shape,
                )
                drafts.append(
                    Draft(
                        name=line.name(stack.name, component, expert),
                        dtype=member.dtype,
                        shape=geometry.shape,
                        nbytes=nbytes,
                        source=None,
                        woven=Woven(stack, line, component, geometry, entry),
                    )
                )
    return drafts


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
