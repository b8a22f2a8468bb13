"""Check that the recipes in an output place every matrix where trusted recipes place it.

The bytes of an output are compared with its source's through the output's own recipes, so these
cannot be trusted: swapping `up` and `gate` there would make wrong bytes compare equal. Only what
decides where bytes are is compared, so that a recipe of an older version, with fewer model types,
components or layouts, is accepted.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import TypeAlias

from moeconv.checkpoint.model import Checkpoint
from moeconv.detect.detect import Detection
from moeconv.detect.stack import Stack, StoredComponent
from moeconv.errors import Damaged, MoeconvError, printable, quoted
from moeconv.layout.axes import Axes, Axis, geometry
from moeconv.layout.recipe import Component, Layout, Recipe, TensorTemplate
from moeconv.manifest.model import ROOT_NAME, Manifest, StackEntry
from moeconv.plan.tensors import laid_out
from moeconv.verification.digests import misdescribed

Trusted: TypeAlias = Callable[[Stack], Recipe]


def recipe_problems(
    name: str, manifest: Manifest, detection: Detection, source: Detection, trusted: Trusted
) -> list[MoeconvError]:
    """Report where an output's recipes, or its tensors' entries, differ from the trusted ones.

    name: of the output, for messages. detection: the output by its own recipes. source: what it
    was made from. trusted: the recipe to believe for a stack of the source.
    """
    in_source = {s.name: s for s in source.stacks}
    entries = {s.name: s for s in manifest.root.stacks}
    causes: dict[tuple[str, str], str] = {}
    for stack in detection.stacks:
        if stack.name in in_source and stack.name in entries:
            of = in_source[stack.name]
            cause = _difference(stack, entries[stack.name], of, trusted(of))
            if cause is not None:
                causes.setdefault((stack.recipe.name, cause), stack.name)
    return [
        Damaged(
            f"recipe {quoted(recipe)} in {quoted(name)} is not the known recipe of this name",
            at=f"`{ROOT_NAME}`, `recipes`, for {quoted(stack)}",
            cause=printable(cause),
            fix="convert again; if it is a recipe of your own, pass it with `--recipe FILE`",
        )
        for (recipe, cause), stack in causes.items()
    ]


def _difference(stack: Stack, entry: StackEntry, source: Stack, trusted: Recipe) -> str | None:
    """How an output's recipe for a stack differs from the trusted one, or None."""
    recipe = stack.recipe
    if recipe.name != trusted.name:
        return f"its experts are of recipe {quoted(trusted.name)}, not of {quoted(recipe.name)}"
    used = [(m, c) for m in stack.members if (c := trusted.component(m.component.name))]
    lost = {m.component.name for m in stack.members} - {c.name for _, c in used}
    if lost:
        return f"the known recipe has no component {quoted(min(lost))}"
    for name in dict.fromkeys((entry.layout, entry.origin_layout)):
        own, other = recipe.layout(name), trusted.layout(name)
        if own is None or other is None:
            return f"the known recipe has no layout {quoted(name)}"
        if _lines(own) != _lines(other):
            return f"layout {quoted(name)} has other lines: {_first_difference(own, other)}"
        for member, component in used:
            cause = _component_difference(member.component, component, own, other)
            if cause is not None:
                return f"layout {quoted(name)}, component {quoted(component.name)}: {cause}"
    stored = trusted.layout(stack.layout.name) or stack.layout  # one of the two above
    copied = stored.name == source.layout.name
    made = trusted.layout(entry.layout)
    if made is not None and made.read_only and not (copied and trusted.fuse is None):
        return f"layout {quoted(made.name)} is never written: loaders read its names differently"
    for member, component in used:
        cause = _stored_otherwise(member, component, stored, source)
        if cause is None and not copied:
            cause = _not_as_written(member, component, stored, stack)
        if cause is not None:
            return cause
    return None


def _key(line: TensorTemplate) -> tuple[object, ...]:
    return line.projections, line.template, line.axes, line.first, line.part


def _lines(layout: Layout) -> frozenset[tuple[object, ...]]:
    return frozenset(map(_key, layout.lines))


def _first_difference(own: Layout, other: Layout) -> str:
    for one, two in ((own, other), (other, own)):
        for line in one.lines:
            if _key(line) not in _lines(two):
                where = "the output's" if one is own else "the known recipe's"
                words = " and ".join(line.projections)
                return f"{where} has {words} as `{line.template}: {line.axes}`"
    return "they are in another order"


def _component_difference(
    own: Component, other: Component, mine: Layout, its: Layout
) -> str | None:
    """How the tensors of a component differ in name or axes; `own` as read in the output."""
    if (own.suffix, own.parameter, own.weight) != (other.suffix, other.parameter, other.weight):
        return f"its name is `{own.suffix or own.name}`, not `{other.suffix or other.name}`"
    possible_axes = [axes for axes in other.possible_axes if same_axes(axes, own.axes)]
    if not possible_axes:
        return f"its axes are `{own.axes}`, not `{other.axes}`"
    there = {_key(line): line for line in its.lines}
    for line in mine.lines:
        wanted = [f for axes in possible_axes for f in there[_key(line)].forms(other.read_as(axes))]
        for form in line.forms(own):
            if not any(same_axes(form, other_form) for other_form in wanted):
                return f"it is stored as `{form}`, not `{wanted[0]}`"
    return None


def _stored_otherwise(
    member: StoredComponent, component: Component, layout: Layout, source: Stack
) -> str | None:
    """How a component is stored in a way that the trusted recipe, or SRC, does not have."""
    line = next((ln for ln in layout.lines if _key(ln) == _key(member.line)), member.line)
    possible_axes = [a for a in component.possible_axes if same_axes(a, member.component.axes)]
    forms = [form for axes in possible_axes for form in line.forms(component.read_as(axes))]
    if not any(same_axes(form, member.axes) for form in forms):
        return f"{quoted(component.name)} is stored as `{member.axes}`, not `{forms[0]}`"
    for projection in member.line.projections:
        held = source.member(projection, component.name)
        if held is not None and not same_axes(held.component.axes, member.component.axes):
            return (
                f"{quoted(component.name)} of {projection} is read as `{member.component.axes}`, "
                f"in SRC as `{held.component.axes}`"
            )
    return None


def _not_as_written(
    member: StoredComponent, component: Component, layout: Layout, stack: Stack
) -> str | None:
    """Report axes that are read but never written, if those that are written fit the shape, too.

    A loader would read the bytes in the written axes, and the shape would not stop it.
    """
    line = next((ln for ln in layout.lines if _key(ln) == _key(member.line)), member.line)
    written = line.forms(component.read_as(member.component.axes))[0]
    if same_axes(written, member.axes):
        return None
    counts = {axis.letter: axis.block for axis in member.axes.flat}
    bound = Axes(
        tuple(tuple(Axis(a.letter, counts.get(a.letter, 1)) for a in dim) for dim in written.dims)
    )
    sizes = stack.sizes.of(line, component.name, 1)  # of one expert: ranks hold some of them each
    if geometry(bound, sizes).shape != geometry(member.axes, sizes).shape:
        return None
    return f"{quoted(component.name)} is stored as `{member.axes}`, loaders read it as `{written}`"


def same_axes(one: Axes, other: Axes) -> bool:
    """Whether axes are the same, where a named block size matches any number or name."""
    return [len(d) for d in one.dims] == [len(d) for d in other.dims] and all(
        a.letter == b.letter and bool(a.named or b.named or a.block == b.block)
        for a, b in zip(one.flat, other.flat, strict=True)
    )


def origin_layout_problems(
    output: Checkpoint, source: Checkpoint, detection: Detection
) -> list[MoeconvError]:
    """Report stacks for which OUT records another `origin_layout` than SRC has.

    detection: SRC's.
    """
    own, in_source = output.origin, source.origin
    layouts = {s.name: s.layout.name for s in detection.stacks}
    if in_source is not None:
        layouts = {s.name: s.origin_layout for s in in_source.manifest.root.stacks}
    return [
        Damaged(
            f"{quoted(entry.name)} was not in the layout that OUT records",
            at=f"`{ROOT_NAME}`, `stacks`",
            cause=f"in SRC it is {quoted(layouts[entry.name])}, "
            f"`origin_layout` is {quoted(entry.origin_layout)}: a restore would use that",
            fix="convert again from this source",
        )
        for entry in (own.manifest.root.stacks if own else ())
        if layouts.get(entry.name, entry.origin_layout) != entry.origin_layout
    ]


def entry_problems(manifest: Manifest, detection: Detection) -> Iterator[MoeconvError]:
    """Report tensors that the parts of an unsharded output describe differently from its recipes.

    For an expert-parallel output, detection itself reads the parts.
    """
    numbers = {s.name: n for n, s in enumerate(manifest.root.stacks)}
    wanted = {
        tensor.name: tensor.expert
        for stack in detection.stacks
        for tensor in laid_out(stack, numbers.get(stack.name, -1), stack.layout, like=stack)
    }
    for part in manifest.parts:
        for tensor in part.tensors:
            if tensor.expert != wanted.get(tensor.name):
                yield misdescribed(wanted.get(tensor.name), part.file, tensor.name)
