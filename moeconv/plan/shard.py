"""Plan an expert-parallel output: each rank's slots in its own files, everything else once.

Slot p of a stack's P slots is on rank p // (P / ep_size). Source of the rule: sglang's expert
location, and every engine that follows DeepSeek's EPLB.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from itertools import chain

from moeconv.core.text import counted, human_size, quoted_list
from moeconv.detect.detect import Detection
from moeconv.detect.stack import Stack
from moeconv.errors import NameCollision, NotVirtual, quoted
from moeconv.layout.recipe import Layout, slots_before
from moeconv.manifest.model import files_name
from moeconv.plan.convert import (
    copied_entries,
    format_notes,
    prove,
    recipes_of,
    stack_entry,
)
from moeconv.plan.model import LedgerEntry, OutputFile, PermuteTile, Plan
from moeconv.plan.pack import Packing, pack
from moeconv.plan.tensors import OutputGroup, PlannedTensor, copied, ledger_entries, output_groups


@dataclass(frozen=True, slots=True)
class Sharding:
    """How stacks are split among ranks.

    rows: physical_to_logical [P] by stack name; a stack without a row stays in the common files.
    """

    ep_size: int
    rows: dict[str, tuple[int, ...]]


def plan_shards(
    detection: Detection,
    sharding: Sharding,
    targets: dict[str, Layout],
    *,
    packing: Packing,
    origin_layouts: dict[str, str],
    virtual: bool,
    notes: tuple[str, ...] = (),
) -> Plan:
    """Plan files for each rank and common files; targets: the layout of each stack by name.

    Raises StraddlingBlock, NameCollision, SubByteAxis, NotVirtual.
    """
    stacks = detection.stacks
    common, ranks = tensors_by_rank(detection, sharding, targets)
    _refuse_two_meanings(common, ranks)
    before = _slots_before(detection, sharding)
    files: list[OutputFile] = []
    for rank, planned_tensors in ((None, common), *enumerate(ranks)):
        prefix = files_name(rank, sharding.ep_size)
        files += pack(planned_tensors, packing, prefix=prefix, rank=rank)
    ledger = copied_entries(detection)
    for stack in stacks:
        ledger += _ledger_entries(stack, targets[stack.name], sharding, before)
    plan = Plan(
        files=tuple(files),
        index_name=None,
        index=b"",
        stacks=tuple(
            stack_entry(s, targets[s.name], origin_layouts, sharding.rows.get(s.name))
            for s in stacks
        ),
        recipes=recipes_of(stacks),
        ledger=tuple(ledger),
        notes=(
            *detection.notes,
            *_not_shared(detection),
            *format_notes(stacks, [targets[s.name] for s in stacks]),
            *notes,
        ),
        ep_size=sharding.ep_size,
        virtual=virtual,
    )
    prove(plan, detection)
    if virtual:
        refuse_permuted(plan.files)
    return plan


def _not_shared(detection: Detection) -> list[str]:
    if not detection.passthrough:
        return []
    return [
        f"{counted(len(detection.passthrough), 'stack')} copied through "
        f"({human_size(sum(t.nbytes for t in detection.passthrough_tensors))}), not split among "
        "ranks: every rank reads all of them"
    ]


def tensors_by_rank(
    detection: Detection, sharding: Sharding, targets: dict[str, Layout]
) -> tuple[list[PlannedTensor], list[list[PlannedTensor]]]:
    """The tensors of the common files, and those of each rank's."""
    common = [copied(t) for t in detection.others]
    ranks: list[list[PlannedTensor]] = [[] for _ in range(sharding.ep_size)]
    before = _slots_before(detection, sharding)
    for number, stack in enumerate(detection.stacks):
        row = sharding.rows.get(stack.name)
        for group in output_groups(stack, number, targets[stack.name]):
            if row is None:
                common += group.for_all()
                continue
            if group.component.is_global:
                local = group.line.slot_template(stack.name, group.component, before)
                common += group.for_all(local=local)
                continue
            share = len(row) // sharding.ep_size
            name = group.line.namer(stack.name, group.component, slots_before=before)
            for rank in range(sharding.ep_size):
                ranks[rank] += _slots(group, name, row, rank * share, share)
    return common, ranks


def _slots_before(detection: Detection, sharding: Sharding) -> int:
    placed = ((s.recipe, sharding.rows.get(s.name)) for s in detection.stacks)
    return slots_before(placed, sharding.ep_size)


def _slots(
    group: OutputGroup,
    name: Callable[[int | None], str],
    row: tuple[int, ...],
    first: int,
    share: int,
) -> list[PlannedTensor]:
    """A rank's tensors of one group: one per slot, or one with all slots."""
    if not group.line.per_expert:
        slots = (first, first + share)
        experts = row[first : first + share]
        return [group.plan_tensor(name(None), group.geometry(share), experts, slots=slots)]
    geometry = group.geometry(1)
    return [
        group.plan_tensor(name(s), geometry, (row[first + s],), slots=(first + s, first + s + 1))
        for s in range(share)
    ]


def _refuse_two_meanings(common: list[PlannedTensor], ranks: list[list[PlannedTensor]]) -> None:
    """Raise NameCollision where a rank would have a name that the common files also have."""
    shared = {planned.name for planned in common}
    for planned in chain.from_iterable(ranks):
        if planned.name in shared:
            raise NameCollision(
                f"the common files and a rank's files would both have {quoted(planned.name)}",
                at=quoted(planned.name),
                cause="one is a slot of this rank, the other is common to all ranks",
                fix="choose a `--layout` without names for each expert, such as `fused`, "
                "or fewer redundant experts",
            )


def _ledger_entries(
    stack: Stack, layout: Layout, sharding: Sharding, before: int
) -> list[LedgerEntry]:
    row = sharding.rows.get(stack.name)
    if row is None:
        return ledger_entries(stack, layout)
    share = len(row) // sharding.ep_size
    numbers: list[list[int]] = [[] for _ in range(stack.sizes.experts)]
    for slot, expert in enumerate(row):
        numbers[expert].append(slot % share)
    replicated = frozenset(m.component.name for m in stack.members if not m.component.is_global)
    return ledger_entries(stack, layout, numbers=numbers, replicated=replicated, before=before)


def refuse_tensor_sidecars(names: tuple[str, ...]) -> None:
    """Raise NotVirtual where a file that holds tensors would be copied as a sidecar."""
    found = [n for n in names if n.endswith((".safetensors", ".bin", ".pt", ".pth", ".gguf"))]
    if found:
        raise NotVirtual(
            f"{quoted_list(found, most=1)} would be copied into a virtual output",
            at=quoted(found[0]),
            cause="the index does not name it, so it counts as a sidecar",
            fix=f"leave it out with `--exclude '{found[0]}'`",
        )


def refuse_permuted(files: tuple[OutputFile, ...]) -> None:
    """Raise NotVirtual where a tensor's values would be in another order."""
    for file in files:
        for tile in file.tiles:
            if isinstance(tile, PermuteTile) and not tile.is_identity:
                name = file.tensors[tile.tensor].name
                raise NotVirtual(
                    f"{quoted(name)} is not a contiguous range of the source",
                    at=quoted(name),
                    cause="in this layout its values are in another order than in the source",
                    fix="pass the source's own layout to `--layout`, or drop `--virtual`",
                )
