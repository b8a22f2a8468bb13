"""Plan a conversion of every stack to a target layout, and check that a plan loses nothing."""

from __future__ import annotations

from collections import defaultdict
from math import prod

from moeconv.checkpoint.index import INDEX_NAME
from moeconv.core.dtypes import BITS
from moeconv.core.text import counted
from moeconv.detect.detect import Detection
from moeconv.detect.stack import Stack
from moeconv.errors import (
    InternalError,
    NoExperts,
    NoPerExpertForm,
    UnknownLayout,
    quoted,
)
from moeconv.layout.axes import OUT
from moeconv.layout.recipe import MATRICES, PLAIN, Layout
from moeconv.manifest.model import Manifest, RecipeText, StackEntry
from moeconv.plan.model import LedgerEntry, Plan
from moeconv.plan.pack import Packing, index_bytes, pack
from moeconv.plan.tensors import copied, laid_out, ledger_entries, matrix_bytes

FUSE = "fuse"
UNFUSE = "unfuse"


def plan_conversion(
    detection: Detection,
    *,
    verb: str,
    layout: str | None,
    packing: Packing,
    origin_layouts: dict[str, str],
) -> Plan:
    """Plan to convert every stack to `layout`, or to the one its recipe names for `verb`.

    origin_layouts: for stacks of an output, the layout of its first foreign source.
    Raises NoExperts, UnknownLayout, NoPerExpertForm, StraddlingBlock, NameCollision, SubByteAxis.
    """
    refuse_no_experts(detection)
    stacks = detection.stacks
    targets = [target_of(stack, verb, layout) for stack in stacks]
    planned_tensors = [copied(t) for t in detection.others]
    ledger = copied_entries(detection)
    for number, (stack, target) in enumerate(zip(stacks, targets, strict=True)):
        planned_tensors += laid_out(stack, number, target)
        ledger += ledger_entries(stack, target)
    files = pack(planned_tensors, packing)
    plan = Plan(
        files=files,
        index_name=INDEX_NAME,
        index=index_bytes(files),
        stacks=tuple(
            stack_entry(stack, target, origin_layouts)
            for stack, target in zip(stacks, targets, strict=True)
        ),
        recipes=recipes_of(stacks),
        ledger=tuple(ledger),
        notes=(*detection.notes, *notes_of(stacks, targets)),
    )
    prove(plan, detection)
    return plan


def refuse_no_experts(detection: Detection) -> None:
    """Raise NoExperts where there is nothing to convert."""
    if detection.stacks or detection.passthrough:
        return
    likely = next((t.name for t in detection.others if ".experts." in t.name), None)
    hint = f"; {quoted(likely)} may be one, under a name that no recipe has" if likely else ""
    raise NoExperts(
        "there are no routed experts in this checkpoint",
        cause=f"none of its {counted(len(detection.others), 'tensor')} belongs to an expert{hint}",
        fix="pass a Mixture-of-Experts checkpoint, or a recipe with `--recipe FILE`",
    )


def copied_entries(detection: Detection) -> list[LedgerEntry]:
    """The ledger entries of tensors that belong to no expert."""
    return [LedgerEntry(t.name, "copied", (t.name,), t.nbytes) for t in detection.others]


def target_of(stack: Stack, verb: str, layout: str | None) -> Layout:
    """The target layout of a stack under a verb. Raises UnknownLayout, NoPerExpertForm."""
    recipe = stack.recipe
    name = layout or (recipe.fuse if verb == FUSE else recipe.unfuse)
    if name is None and (verb == FUSE or stack.layout.per_expert):
        return stack.layout  # nothing of that kind exists, or it is there already
    if name is None:
        raise NoPerExpertForm(
            f"the family of {quoted(stack.name)} is published only fused",
            at=f"recipe {quoted(recipe.name)}",
            cause="no program is known to read its experts one by one",
            fix="pass `--layout per-expert` to write them anyway",
        )
    target = recipe.layout(name)
    if target is None or target.read_only:
        names = [la.name for la in recipe.layouts if not la.read_only]
        raise UnknownLayout(
            f"recipe {quoted(recipe.name)} has no layout {quoted(name)} to write",
            at=quoted(stack.name),
            cause=f"it has {', '.join(map(quoted, names))}",
            fix=f"pass one of these to `--layout`, for example {quoted(names[0])}",
        )
    reason = _unwritable(stack, target)
    if reason is None:
        return target
    others = [la.name for la in recipe.layouts if not la.read_only and not _unwritable(stack, la)]
    raise UnknownLayout(
        f"layout {quoted(target.name)} is not for the experts of {quoted(stack.name)}",
        at=quoted(stack.name),
        cause=reason,
        fix=f"these work: {', '.join(map(quoted, others))}",
    )


def _unwritable(stack: Stack, target: Layout) -> str | None:
    """Why a layout cannot hold a stack's components; None where it can."""
    if target.name == stack.layout.name:
        return None
    for member in stack.members:
        component, axes = member.component, member.axes
        name = quoted(component.name)
        packed = component.weight and component.axes.flat[0].letter != OUT
        if target.takes == PLAIN and (packed or axes.in_blocks):
            what = "is packed" if component.weight else "has one value for a block or group"
            return f"its {name} {what}; kernels for transposed weights do not support that"
        if target.takes == MATRICES and component.weight and axes.packing:
            return f"its {name} has packing axes, which this layout has no parameter for"
    return None


def stack_entry(
    stack: Stack,
    target: Layout,
    origin_layouts: dict[str, str],
    row: tuple[int, ...] | None = None,
) -> StackEntry:
    """The manifest entry of a stack; row: physical_to_logical [P], if it is split among ranks."""
    return StackEntry(
        name=stack.name,
        recipe=stack.recipe.name,
        layout=target.name,
        origin_layout=origin_layouts.get(stack.name, stack.layout.name),
        experts=stack.sizes.experts,
        width=stack.sizes.width,
        hidden=stack.sizes.hidden,
        physical_to_logical=row,
    )


def entries_as_stored(stacks: tuple[Stack, ...]) -> tuple[StackEntry, ...]:
    """The manifest entries of stacks in the layouts that they have, without a history."""
    return tuple(stack_entry(s, s.layout, {}) for s in stacks)


def recipes_of(stacks: tuple[Stack, ...]) -> tuple[RecipeText, ...]:
    """The recipes that the output must carry."""
    used = {s.recipe.name: s.recipe.toml for s in stacks}
    return tuple(RecipeText(name, toml) for name, toml in sorted(used.items()))


def notes_of(stacks: tuple[Stack, ...], targets: list[Layout]) -> tuple[str, ...]:
    """Notes on stacks that are already in their target layout, and on formats."""
    kept: dict[str, int] = {}
    for stack, target in zip(stacks, targets, strict=True):
        if stack.layout.name == target.name:
            kept[target.name] = kept.get(target.name, 0) + 1
    already = (
        f"{counted(count, 'stack')} already {quoted(name)}: copied through"
        for name, count in kept.items()
    )
    return (*already, *format_notes(stacks, targets))


def format_notes(stacks: tuple[Stack, ...], targets: list[Layout]) -> tuple[str, ...]:
    """The recipes' notes on components that get their family's fused names here."""
    notes = {
        f"{member.component.name}: {member.component.note}": None
        for stack, target in zip(stacks, targets, strict=True)
        if stack.layout.name != target.name == stack.recipe.fuse and not target.per_expert
        for member in stack.members
        if member.component.note
    }
    return tuple(notes)


def prove(plan: Plan, detection: Detection) -> None:
    """Check that tiles cover every data byte exactly once and that no tensor is lost.

    Raises InternalError: it fails only because of a bug in moeconv.
    """
    for file in plan.files:
        at = len(file.header)
        for tile in file.tiles:
            if tile.start != at:
                raise InternalError(f"the plan of {quoted(file.name)} has a gap at byte {at:,}")
            at += tile.nbytes
        if at != file.size:
            raise InternalError(
                f"the plan of {quoted(file.name)} ends at {at:,}, not {file.size:,}"
            )
    made = {t.name for f in plan.files for t in f.tensors}
    for entry in plan.ledger:
        lost = not entry.into and entry.verb != "replica"
        if lost or not made.issuperset(entry.into):
            raise InternalError(f"the plan loses {quoted(entry.source)}")
    read, written = _logical_source(detection), _logical_output(plan)
    if written != read + plan.replica_bytes:
        raise InternalError(
            f"the plan reads {read:,} bytes of matrices, adds {plan.replica_bytes:,} of redundant "
            f"experts and writes {written:,}"
        )


def _logical_source(detection: Detection) -> int:
    """Bytes of all logical matrices and other tensors: independent of how they are stored."""
    total = sum(t.nbytes for t in detection.others)
    for stack in detection.stacks:
        for m in stack.members:
            total += stack.sizes.experts * len(m.line.projections) * matrix_bytes(m)
    return total


def _logical_output(plan: Plan) -> int:
    total = 0
    for tensor in (t for f in plan.files for t in f.tensors):
        expert = tensor.expert
        if expert is None:
            total += tensor.nbytes
        else:
            total += tensor.units * prod(expert.matrix) * BITS[tensor.dtype] // 8
    return total


def unequal_notes(stacks: tuple[Stack, ...], manifest: Manifest) -> tuple[str, ...]:
    """A line for each component whose gate and up differ, where its recipe asks for one.

    A plan knows headers only; the digests of a finished output tell equal values without a read.
    """
    asked = {
        (stack.name, m.component.name): m.component.unequal
        for stack in stacks
        for m in stack.members
        if m.component.unequal
    }
    differ: dict[tuple[str, str], int] = defaultdict(int)
    for tensor in (t for part in manifest.parts for t in part.tensors):
        expert = tensor.expert
        if expert is None or len(expert.projections) != 2 or not tensor.digests:
            continue
        why = asked.get((manifest.root.stacks[expert.stack].name, expert.component))
        if why:
            pairs = zip(tensor.digests[::2], tensor.digests[1::2], strict=True)
            differ[expert.component, why] += sum(gate != up for gate, up in pairs)
    return tuple(
        f"{component} of gate and up differ in {counted(count, 'expert')}, kept apart: {why}"
        for (component, why), count in differ.items()
        if count
    )
