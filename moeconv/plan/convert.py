"""Planning a conversion: every stack to a target layout, or the whole set back to its origin."""

from __future__ import annotations

from dataclasses import dataclass
from math import prod

from moeconv.checkpoint.dtypes import BITS
from moeconv.checkpoint.header import Header
from moeconv.checkpoint.index import INDEX_NAME
from moeconv.checkpoint.origin import Origin
from moeconv.errors import (
    BadManifest,
    InternalError,
    NoExperts,
    NoPerExpertForm,
    UnknownLayout,
    quoted,
)
from moeconv.layout.detect import Detection
from moeconv.layout.recipe import Layout
from moeconv.layout.stack import Stack
from moeconv.manifest import RecipeText, StackEntry
from moeconv.plan.draft import Draft, copied, fates, laid_out
from moeconv.plan.pack import index_bytes, output_file, pack
from moeconv.plan.values import Fate, OutputFile, Plan
from moeconv.units import counted

FUSE = "fuse"
UNFUSE = "unfuse"
VERBS = (FUSE, UNFUSE)


def plan_conversion(
    detection: Detection,
    *,
    verb: str,
    layout: str | None,
    max_shard_size: int,
    origin_layouts: dict[str, str],
) -> Plan:
    """Every stack to `layout`, or to the one its family's recipe names for `verb`.

    origin_layouts: for stacks of our own sets, the layout of their first foreign source.
    Raises NoExperts, UnknownLayout, NoPerExpertForm, StraddlingBlock, NameCollision, SubByteAxis.
    """
    stacks = detection.stacks
    if not stacks:
        likely = next((t.name for t in detection.others if ".experts." in t.name), None)
        hint = f"; {quoted(likely)} may be one under a name no recipe has" if likely else ""
        raise NoExperts(
            "there are no routed experts in this checkpoint",
            cause=f"none of its {counted(len(detection.others), 'tensor')} is an expert's{hint}",
            fix="give a Mixture-of-Experts checkpoint, or a recipe with `--recipe FILE`",
        )
    targets = [_target(stack, verb, layout) for stack in stacks]
    drafts = [copied(t) for t in detection.others]
    ledger = [Fate(t.name, "copied", (t.name,), t.nbytes) for t in detection.others]
    for number, (stack, target) in enumerate(zip(stacks, targets, strict=True)):
        drafts += laid_out(stack, number, target)
        ledger += fates(stack, target)
    files = pack(drafts, max_shard_size=max_shard_size)
    plan = Plan(
        files=files,
        index_name=INDEX_NAME,
        index=index_bytes(files),
        stacks=tuple(
            _entry(stack, target, origin_layouts)
            for stack, target in zip(stacks, targets, strict=True)
        ),
        recipes=_recipes(stacks),
        ledger=tuple(ledger),
        notes=_notes(stacks, targets),
    )
    _prove(plan, detection)
    return plan


def _target(stack: Stack, verb: str, layout: str | None) -> Layout:
    recipe = stack.recipe
    name = layout or (recipe.fuse if verb == FUSE else recipe.unfuse)
    if name is None and (verb == FUSE or stack.layout.per_expert):
        return stack.layout  # nothing of that kind exists, or it is there already
    if name is None:
        raise NoPerExpertForm(
            f"the family of {quoted(stack.name)} is published fused only",
            at=f"recipe {quoted(recipe.name)}",
            cause="no program is known to read its experts one by one",
            fix="`--layout per-expert` writes them all the same",
        )
    target = recipe.layout(name)
    if target is None or target.square is not None:
        names = [la.name for la in recipe.layouts if la.square is None]
        raise UnknownLayout(
            f"recipe {quoted(recipe.name)} has no layout {quoted(name)} to write",
            at=quoted(stack.name),
            cause=f"it has {', '.join(map(quoted, names))}",
            fix=f"give one of these to `--layout`, {quoted(names[0])} for example",
        )
    return target


def _entry(stack: Stack, target: Layout, origin_layouts: dict[str, str]) -> StackEntry:
    return StackEntry(
        name=stack.name,
        recipe=stack.recipe.name,
        layout=target.name,
        origin_layout=origin_layouts.get(stack.name, stack.layout.name),
        experts=stack.sizes.experts,
        width=stack.sizes.width,
        hidden=stack.sizes.hidden,
    )


def _recipes(stacks: tuple[Stack, ...]) -> tuple[RecipeText, ...]:
    used = {s.recipe.name: s.recipe.toml for s in stacks}
    return tuple(RecipeText(name, toml) for name, toml in sorted(used.items()))


def _notes(stacks: tuple[Stack, ...], targets: list[Layout]) -> tuple[str, ...]:
    kept: dict[str, int] = {}
    for stack, target in zip(stacks, targets, strict=True):
        if stack.layout.name == target.name:
            kept[target.name] = kept.get(target.name, 0) + 1
    return tuple(
        f"{counted(count, 'stack')} already {quoted(name)}: copied through"
        for name, count in kept.items()
    )


def plan_restore(detection: Detection, original: Detection, origin: Origin) -> Plan:
    """The origin's own files, byte for byte, from the tensors of one of our sets.

    detection: the set as it is; original: what the origin's headers spell, in its own layouts.
    Raises BadManifest where the two are not the same model.
    """
    drafts, ledger = _drafts_onto(detection, original)
    kept = {t.name for t in original.others} | {s.name for s in original.stacks}
    for name in (*(t.name for t in detection.others), *(s.name for s in detection.stacks)):
        if name not in kept:
            raise _foreign(name)
    files = tuple(
        _existing_file(PlacedHeader(f.name, f.size, f.header), drafts) for f in origin.files
    )
    plan = Plan(
        files=files,
        index_name=origin.index.name if origin.index else None,
        index=origin.index.raw if origin.index else b"",
        stacks=tuple(_entry(s, s.layout, {}) for s in original.stacks),
        recipes=(),
        ledger=tuple(ledger),
        notes=("back to the original files, bit for bit",),
        restores=True,
    )
    _prove(plan, detection)
    return plan


@dataclass(frozen=True, slots=True)
class PlacedHeader:
    """A data file that exists already: its name, size and header."""

    name: str
    size: int
    header: Header


def _drafts_onto(detection: Detection, target: Detection) -> tuple[dict[str, Draft], list[Fate]]:
    current = {s.name: s for s in detection.stacks}
    plain = {t.name: t for t in detection.others}
    drafts: dict[str, Draft] = {}
    ledger = [Fate(t.name, "copied", (t.name,), t.nbytes) for t in detection.others]
    for number, stack in enumerate(target.stacks):
        source = current.get(stack.name)
        if source is None or source.sizes != stack.sizes:
            raise _foreign(stack.name)
        drafts.update((d.name, d) for d in laid_out(source, number, stack.layout))
        ledger += fates(source, stack.layout)
    for tensor in target.others:
        if tensor.name not in plain:
            raise _foreign(tensor.name)
        drafts[tensor.name] = copied(plain[tensor.name])
    return drafts, ledger


def _existing_file(file: PlacedHeader, drafts: dict[str, Draft]) -> OutputFile:
    places = []
    for tensor in sorted(file.header.tensors, key=lambda t: (t.offset, t.nbytes)):
        draft = drafts.get(tensor.name)
        if draft is None or draft.nbytes != tensor.nbytes or draft.dtype != tensor.dtype:
            raise _foreign(tensor.name)
        places.append((draft, tensor.offset))
    return output_file(file.name, file.header.raw, places, size=file.size)


def _foreign(name: str) -> BadManifest:
    return BadManifest(
        "the set's origin and its tensors are not of the same model",
        at=quoted(name),
        cause="one of them has it, the other does not, or of another size",
        fix="convert the checkpoint again",
    )


def plan_onto(
    detection: Detection, target: Detection, files: tuple[PlacedHeader, ...]
) -> tuple[OutputFile, ...]:
    """Existing `files`, whose tensors are `target`'s, as if filled from the tensors of `detection`.

    With both the same this re-reads a checkpoint unit by unit; with two checkpoints it is the
    inverse plan, under which every byte of the one can be held against the other.
    Raises BadManifest where `detection` has nothing for a tensor.
    """
    drafts, _ = _drafts_onto(detection, target)
    return tuple(_existing_file(file, drafts) for file in files)


def _prove(plan: Plan, detection: Detection) -> None:
    """The plan's own proof: tiles cover every data byte once, nothing is lost on the way."""
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
    for fate in plan.ledger:
        if not fate.into or not made.issuperset(fate.into):
            raise InternalError(f"the plan loses {quoted(fate.source)}")
    read, written = _logical_source(detection), _logical_output(plan)
    if written != read:
        raise InternalError(f"the plan reads {read:,} bytes of matrices and writes {written:,}")


def _logical_source(detection: Detection) -> int:
    """Bytes of all logical matrices and other tensors: independent of how they are stored."""
    total = sum(t.nbytes for t in detection.others)
    for stack in detection.stacks:
        for m in stack.members:
            matrices = stack.sizes.experts * len(m.line.projections)
            total += matrices * prod(m.geometry.canonical_shape) * BITS[m.dtype] // 8
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
