"""The stacks of an expert-parallel output, from its manifest, checked against recipes and headers.

Names cannot tell them: all ranks use the same tensor names, and a slot is not an expert.
"""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass, replace
from typing import Final, NamedTuple

from moeconv.checkpoint.header import StoredTensor
from moeconv.core.names import natural_key
from moeconv.detect.detect import Detection
from moeconv.detect.stack import PackingAxis, Sizes, Stack, StoredComponent
from moeconv.errors import BadManifest, MissingExpert, MoeconvError, abridged, printable, quoted
from moeconv.layout.axes import EXPERT, Axes, AxesSyntax, geometry, is_packing, parse_axes
from moeconv.layout.recipe import Component, Layout, Recipe, TensorTemplate, slots_before
from moeconv.manifest.model import ExpertEntry, Manifest, StackEntry, TensorEntry

_MAX_CAUSE: Final = 2000


@dataclass(frozen=True, slots=True)
class _ExpertTensor:
    """An expert tensor of an output: its entry in a manifest part, and where it is stored."""

    entry: TensorEntry
    expert: ExpertEntry
    stored: StoredTensor


class _Role(NamedTuple):
    """What a tensor is by its entry; `form`: its axes with block sizes by name."""

    line: TensorTemplate
    component: Component
    axes: Axes
    form: Axes


@dataclass(frozen=True, slots=True)
class _Ranks:
    """The number of ranks, and `before` as in `TensorTemplate.first_slot`."""

    size: int
    before: int


def detection_from_manifest(
    manifest: Manifest, stored: dict[tuple[str, str], StoredTensor], recipes: tuple[Recipe, ...]
) -> Detection:
    """Return the stacks of an expert-parallel output, with each expert's replica in the first slot.

    stored: the headers' tensors, by file and tensor name. Problems are collected, not raised.
    """
    by_name = {r.name: r for r in recipes}
    by_stack, others = _split_by_stack(manifest, stored)
    stacks: list[Stack] = []
    problems: list[MoeconvError] = []
    size = manifest.root.ep_size or 1
    placed = ((by_name[s.recipe], s.physical_to_logical) for s in manifest.root.stacks)
    ranks = _Ranks(size, slots_before(placed, size))
    for number, entry in enumerate(manifest.root.stacks):
        try:
            recipe = by_name[entry.recipe]
            stacks.append(_stack(entry, ranks, recipe, by_stack.get(number, [])))
        except MoeconvError as problem:
            problems.append(problem)
    stacks.sort(key=lambda s: natural_key(s.name))
    accepted = {s.name for s in stacks}
    rejected = tuple(s.name for s in manifest.root.stacks if s.name not in accepted)
    return Detection(tuple(stacks), others, tuple(problems), rejected)


def _split_by_stack(
    manifest: Manifest, stored: dict[tuple[str, str], StoredTensor]
) -> tuple[dict[int, list[_ExpertTensor]], tuple[StoredTensor, ...]]:
    """Return the expert tensors of each stack, by its number, and the tensors of no expert."""
    by_stack: dict[int, list[_ExpertTensor]] = defaultdict(list)
    others: list[StoredTensor] = []
    for part in manifest.parts:
        for entry in part.tensors:
            stored_tensor = stored.get((part.file or str(part.rank), entry.name))
            if stored_tensor is None:
                raise _unfit(entry.name, "its part lists it, but its file does not have it")
            if entry.expert is None:
                others.append(stored_tensor)
            else:
                by_stack[entry.expert.stack].append(
                    _ExpertTensor(entry, entry.expert, stored_tensor)
                )
    return by_stack, tuple(others)


def _role(layout: Layout, recipe: Recipe, one: _ExpertTensor) -> _Role:
    """Return what a tensor's entry states that it is. Raises BadManifest."""
    expert = one.expert
    line = next((ln for ln in layout.lines if ln.projections == expert.projections), None)
    component = recipe.component(expert.component)
    if line is None or component is None:
        raise _unfit(
            one.entry.name,
            f"recipe {quoted(recipe.name)} has no {expert.component} of "
            f"{' and '.join(expert.projections)} in layout {quoted(layout.name)}",
        )
    try:
        recorded = parse_axes(expert.axes)
    except AxesSyntax as problem:
        raise _unfit(one.entry.name, str(problem)) from None
    options = map(component.read_as, component.possible_axes)
    forms = [(option, form) for option in options for form in line.forms(option)]
    for option, form in forms:
        if _binds(form, recorded):
            return _Role(line, option, recorded, form)
    known = " or ".join(f"`{form}`" for _, form in forms)
    raise _unfit(one.entry.name, f"its axes are `{recorded}`, the recipe says {known}")


def _binds(named: Axes, recorded: Axes) -> bool:
    """Whether axes are those of a recipe, with numbers in place of named block sizes."""
    return [len(d) for d in named.dims] == [len(d) for d in recorded.dims] and all(
        own.letter == axis.letter and bool(own.named or own.block == axis.block) and not axis.named
        for own, axis in zip(named.flat, recorded.flat, strict=True)
    )


def _stack(entry: StackEntry, ranks: _Ranks, recipe: Recipe, tensors: list[_ExpertTensor]) -> Stack:
    layout = recipe.layout(entry.layout)
    if layout is None or not tensors:
        raise _unfit(entry.name, "no tensor of the output belongs to this stack")
    roles: dict[tuple[tuple[str, ...], str], tuple[_Role, list[_ExpertTensor]]] = {}
    block_sizes: dict[str, int] = {}
    packing: dict[PackingAxis, int] = {}
    for one in tensors:
        role = _role(layout, recipe, one)
        key = (role.line.projections, role.component.name)
        roles.setdefault(key, (role, []))[1].append(one)
        axes = zip(role.form.flat, role.axes.flat, strict=True)
        block_sizes |= {own.named: axis.block for own, axis in axes if own.named}
        packing |= _packing(one, role)
    sizes = Sizes(entry.experts, entry.width, entry.hidden, tuple(sorted(packing.items())))
    stack = Stack(entry.name, recipe, layout, sizes, tuple(sorted(block_sizes.items())), ())
    members = tuple(
        _member(stack, entry, ranks, *roles[line.projections, component.name])
        for line in layout.lines
        for component in recipe.components
        if (line.projections, component.name) in roles
    )
    return replace(stack, members=members)


def _packing(one: _ExpertTensor, role: _Role) -> dict[PackingAxis, int]:
    """Return the sizes of the packing axes, from the canonical shape of one matrix."""
    component = role.component
    canonical = component.axes.canonical
    if len(canonical) != len(one.expert.matrix):
        raise _unfit(
            one.entry.name, f"a matrix `{component.axes}` has another number of dimensions"
        )
    sizes = zip(canonical, one.expert.matrix, strict=True)
    return {
        PackingAxis(component.name, role.line.is_down, letter): size
        for letter, size in sizes
        if is_packing(letter)
    }


def _member(
    stack: Stack, entry: StackEntry, ranks: _Ranks, role: _Role, group: list[_ExpertTensor]
) -> StoredComponent:
    line, component, axes, _ = role
    row = entry.physical_to_logical
    share = len(row) // ranks.size if row else 0
    first: dict[int, tuple[int, int]] = {}
    slots: set[int] = set()
    for number, one in enumerate(group):
        if one.entry.dtype != group[0].entry.dtype:
            raise _unfit(one.entry.name, f"it is {one.entry.dtype}, not {group[0].entry.dtype}")
        _check(stack, role, one, share, ranks.before)
        start = one.expert.slots[0] if one.expert.slots else one.expert.experts[0]
        for position, expert in enumerate(one.expert.experts):
            slots.add(start + position)
            first.setdefault(expert, (number, position if EXPERT in axes.letters else 0))
    wanted = len(row) if row and group[0].expert.slots else entry.experts
    count = sum(len(one.expert.experts) for one in group)
    if not len(slots) == len({*slots, *range(wanted)}) == count or len(first) != entry.experts:
        raise MissingExpert(
            f"{quoted(entry.name)} is incomplete",
            at=quoted(group[0].entry.name),
            cause=f"{count} of {wanted} slots hold its {component.name} of "
            f"{' and '.join(line.projections)}, for {len(first)} of {entry.experts} experts",
            fix="convert the checkpoint again",
        )
    return StoredComponent(
        line=line,
        component=component,
        dtype=group[0].entry.dtype,
        axes=axes,
        geometry=geometry(axes, stack.sizes.of(line, component.name, len(group[0].expert.experts))),
        tensors=tuple(one.stored for one in group),
        places=tuple(first[e] for e in range(entry.experts)),
    )


def _check(stack: Stack, role: _Role, one: _ExpertTensor, share: int, before: int) -> None:
    """Check a tensor against what its recipe makes of its stack. Raises BadManifest."""
    line, component, axes, _ = role
    expert, slots = one.expert, one.expert.slots
    here = geometry(axes, stack.sizes.of(line, component.name, len(expert.experts)))
    number, local = None, None
    if line.per_expert:
        number = slots[0] % share if slots and share else expert.experts[0]
        template = line.slot_template(stack.name, component, before)
        local = template if share and not slots else None
    if expert.local != local:
        raise _unfit(one.entry.name, f"`local` is {expert.local}, but its recipe makes it {local}")
    if share and component.is_global == bool(slots):
        where = "in the common files" if slots else "in the files of ranks"
        raise _unfit(one.entry.name, f"ranks share its stack: a {component.name} belongs {where}")
    recorded = (one.entry.name, expert.axes, expert.matrix, one.stored.shape, one.stored.dtype)
    need = (
        line.namer(stack.name, component, slots_before=before if slots else None)(number),
        str(axes),
        here.canonical_shape,
        here.shape,
        one.entry.dtype,
    )
    if recorded != need or (line.per_expert and len(expert.experts) != 1):
        raise _unfit(one.entry.name, f"it is {recorded}, its recipe makes it {need}")


def _unfit(name: str, cause: str) -> BadManifest:
    return BadManifest(
        f"{quoted(name)} does not match the output's manifest",
        at=quoted(name),
        cause=printable(abridged(cause, _MAX_CAUSE)),
    )
