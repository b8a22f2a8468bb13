"""The tensors of the output, before files and offsets are assigned to them."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import chain
from math import prod

from moeconv.checkpoint.header import StoredTensor
from moeconv.core.dtypes import BITS
from moeconv.detect.stack import Stack, StoredComponent
from moeconv.errors import ExpertDtype, StraddlingBlock, quoted
from moeconv.layout.axes import EXPERT, PAIR, Axes, Geometry, geometry
from moeconv.layout.recipe import Component, Layout, TensorTemplate
from moeconv.layout.region import ProjectionRegions
from moeconv.manifest.model import ExpertEntry
from moeconv.plan.model import LedgerEntry


@dataclass(frozen=True, slots=True)
class PlannedTensor:
    """One output tensor: a copy of `source`, or matrices of experts, read from `regions`.

    expert: its entry in the manifest; geometry: where its matrices are in it; keys: the expert to
    read for each position along its E; regions: where each of its projections is stored.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    nbytes: int
    source: StoredTensor | None = None
    expert: ExpertEntry | None = None
    geometry: Geometry | None = None
    keys: tuple[int, ...] = ()
    regions: tuple[ProjectionRegions, ...] = ()


def copied(tensor: StoredTensor) -> PlannedTensor:
    """A tensor that belongs to no expert, unchanged."""
    return PlannedTensor(tensor.name, tensor.dtype, tensor.shape, tensor.nbytes, tensor)


@dataclass(frozen=True, slots=True)
class OutputGroup:
    """All output tensors of one line and one component of a stack."""

    stack: Stack
    number: int  # of the stack, in the manifest
    line: TensorTemplate
    component: Component
    dtype: str
    axes: Axes
    regions: tuple[ProjectionRegions, ...]

    def name(self, number: int | None) -> str:
        """The name of a tensor; number: of the expert or slot, where each has its own."""
        return self.line.name(self.stack.name, self.component, number)

    def geometry(self, experts: int) -> Geometry:
        """The geometry of a tensor that holds so many experts."""
        sizes = self.stack.sizes.of(self.line, self.component.name, experts)
        return geometry(self.axes, sizes)

    def plan_tensor(
        self,
        name: str,
        geometry: Geometry,
        experts: tuple[int, ...],
        *,
        slots: tuple[int, int] | None = None,
        local: str | None = None,
    ) -> PlannedTensor:
        """One output tensor with these experts; slots and local are as in the manifest."""
        expert = ExpertEntry(
            stack=self.number,
            experts=experts,
            projections=self.line.projections,
            component=self.component.name,
            axes=str(self.axes),
            matrix=geometry.canonical_shape,
            slots=slots,
            local=local,
        )
        nbytes = geometry.numel * BITS[self.dtype] // 8
        return PlannedTensor(
            name, self.dtype, geometry.shape, nbytes, None, expert, geometry, experts, self.regions
        )

    def for_all(self, *, local: str | None = None) -> list[PlannedTensor]:
        """The tensors with every expert in logical order.

        local: the template of their names on a rank, where each expert has a tensor.
        """
        count = self.stack.sizes.experts
        if not self.line.per_expert:
            return [self.plan_tensor(self.name(None), self.geometry(count), tuple(range(count)))]
        geometry = self.geometry(1)
        return [self.plan_tensor(self.name(e), geometry, (e,), local=local) for e in range(count)]


def laid_out(
    stack: Stack, number: int, layout: Layout, *, like: Stack | None = None
) -> list[PlannedTensor]:
    """All output tensors of a stack in a layout. Raises StraddlingBlock, ExpertDtype.

    number: the stack's index in the manifest. like: the same stack, stored in this layout: its
    axes are taken where the recipe allows several.
    """
    groups = output_groups(stack, number, layout, like=like)
    return list(chain.from_iterable(k.for_all() for k in groups))


def output_groups(
    stack: Stack, number: int, layout: Layout, *, like: Stack | None = None
) -> Iterator[OutputGroup]:
    """The groups that a stack stores in a layout: each line with each component.

    Raises StraddlingBlock, ExpertDtype.
    """
    for line in layout.lines:
        for name in (c.name for c in stack.recipe.components if line.holds(c)):
            member = stack.member(line.projections[0], name)
            if member is None:
                continue
            component = member.component
            axes = (like or stack).axes_in(line, component)
            members = (stack.member(p, name) for p in line.projections)
            held = tuple(m for m in members if m is not None)
            for one in held:
                refuse_straddling(stack, one.line, one.component, one.axes)
            refuse_straddling(stack, line, component, axes)
            refuse_two_dtypes(stack, held)
            regions = tuple(m.regions(p) for m, p in zip(held, line.projections, strict=True))
            yield OutputGroup(stack, number, line, component, held[0].dtype, axes, regions)


def refuse_two_dtypes(stack: Stack, joined: tuple[StoredComponent, ...]) -> None:
    """Refuse to join tensors of two dtypes in one: its dtype would be wrong for one of them."""
    dtypes = dict.fromkeys(m.dtype for m in joined)
    if len(dtypes) > 1:
        first = joined[0]
        raise ExpertDtype(
            f"{' and '.join(p for m in joined for p in m.line.projections)} of "
            f"{quoted(stack.name)} differ in the dtype of {quoted(first.component.name)}: "
            f"{' and '.join(dtypes)}",
            at=", ".join(quoted(m.tensors[0].name) for m in joined),
            cause="one tensor cannot hold both",
            fix="keep them apart (`--layout per-expert`), or use a checkpoint whose projections "
            "have the same dtype",
        )


def refuse_straddling(stack: Stack, line: TensorTemplate, component: Component, axes: Axes) -> None:
    """Refuse blocks that cross two matrices: their bytes would belong to neither."""
    sizes = stack.sizes.of(line, component.name)
    for dim in axes.dims:
        for place, axis in enumerate(dim):
            if not axis.in_blocks or not {a.letter for a in dim} & {EXPERT, PAIR}:
                continue
            size = sizes[axis.letter]
            if size % axis.block or place != len(dim) - 1:
                name = line.name(stack.name, component, 0 if line.per_expert else None)
                raise StraddlingBlock(
                    f"blocks of {axis.block} do not fit {quoted(name)}",
                    at=quoted(stack.name),
                    cause=f"each matrix has {size} rows; {size} is not a multiple of {axis.block}, "
                    f"so in `{axes}` one block would cross two of them",
                    fix="keep this stack per-expert, or dequantise it first"
                    if line not in {m.line for m in stack.members}
                    # nothing comes of it but what it is: no layout takes such blocks apart
                    else "convert the checkpoint that this one was joined from, or dequantise it",
                )


def ledger_entries(
    stack: Stack,
    layout: Layout,
    *,
    numbers: list[list[int]] | None = None,
    replicated: frozenset[str] = frozenset(),
    before: int = 0,
) -> list[LedgerEntry]:
    """The ledger entries of a stack's tensors in `layout`.

    numbers: for each expert its slots, as all ranks that hold it count them, where names are by
    slot; replicated: components that are written once for each of these; before: as in
    `TensorTemplate.first_slot`.
    """
    out = []
    own = [[e] for e in range(stack.sizes.experts)]
    for member in stack.members:
        component = member.component
        many = numbers if numbers is not None and component.name in replicated else own
        lines = [
            ln
            for ln in layout.lines
            if set(member.line.projections) & set(ln.projections) and ln.holds(component)
        ]
        by_slot = None if many is own else before
        named = [
            (ln.namer(stack.name, component, slots_before=by_slot), ln.per_expert) for ln in lines
        ]
        held = experts_read(member, stack.sizes.experts)
        usual = _verb(stack.layout, layout)
        if usual == "copied" and not member.line.per_expert:
            usual = "merged" if member.places else "sliced" if many is not own else usual
        if any(_shares(stack, line, component) for line in lines):
            usual = "shared"
        nbytes = matrix_bytes(member) * len(member.line.projections)
        beyond = [(len(its) - 1) * nbytes for its in many]
        joined = tuple(dict.fromkeys(name(None) for name, per_expert in named if not per_expert))
        apart = [name for name, per_expert in named if per_expert]
        for tensor, experts in zip(member.tensors, held, strict=True):
            # one with no expert of its own says the same as another that is read
            verb = usual if experts else "replica"
            into = joined
            if apart:
                names = (name(n) for name in apart for e in experts for n in many[e])
                into = tuple(dict.fromkeys((*joined, *names)))
            added = sum([beyond[e] for e in experts])
            out.append(LedgerEntry(tensor.name, verb, into, tensor.nbytes, added))
    return out


def matrix_bytes(member: StoredComponent) -> int:
    """Bytes of one logical matrix of a member."""
    return prod(member.geometry.canonical_shape) * BITS[member.dtype] // 8


def experts_read(member: StoredComponent, experts: int) -> list[list[int]]:
    """The experts that are read from each of a member's tensors."""
    if member.places is None:
        return [[e] for e in range(experts)] if member.line.per_expert else [list(range(experts))]
    out: list[list[int]] = [[] for _ in member.tensors]
    for expert, (number, _) in enumerate(member.places):
        out[number].append(expert)
    return out


def _shares(stack: Stack, line: TensorTemplate, component: Component) -> bool:
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
