"""Plan files whose headers already exist: the origin's own, or those of a given checkpoint."""

from __future__ import annotations

from dataclasses import dataclass

from moeconv.checkpoint.header import Header, StoredTensor
from moeconv.checkpoint.origin import Origin
from moeconv.core.dtypes import BITS
from moeconv.detect.detect import Detection
from moeconv.errors import BadManifest, quoted
from moeconv.layout.axes import geometry, parse_axes, stored_sizes
from moeconv.layout.region import ProjectionRegions, Region
from moeconv.manifest.model import ExpertEntry, Manifest
from moeconv.plan.convert import copied_entries, entries_as_stored, prove
from moeconv.plan.model import LedgerEntry, OutputFile, Plan
from moeconv.plan.pack import output_file
from moeconv.plan.shard import Sharding, tensors_by_rank
from moeconv.plan.tensors import PlannedTensor, copied, laid_out, ledger_entries


def plan_restore(detection: Detection, original: Detection, origin: Origin) -> Plan:
    """Plan the origin's own files, byte for byte, from the tensors of an output.

    detection: the output as it is; original: the stacks of the origin's headers.
    Raises BadManifest where the two are not the same model.
    """
    planned_tensors = _tensors_onto(detection, original)
    kept = {t.name for t in original.others} | {s.name for s in original.stacks}
    for name in (*(t.name for t in detection.others), *(s.name for s in detection.stacks)):
        if name not in kept:
            raise _foreign(name)
    files = tuple(
        _existing_file(PlacedHeader(f.name, f.size, f.header), planned_tensors)
        for f in origin.files
    )
    plan = Plan(
        files=files,
        index_name=origin.index.name if origin.index else None,
        index=origin.index.raw if origin.index else b"",
        stacks=entries_as_stored(original.stacks),
        recipes=(),
        ledger=_ledger_onto(detection, original),
        notes=("back to the original files",),
        restores=True,
    )
    prove(plan, detection)
    return plan


@dataclass(frozen=True, slots=True)
class PlacedHeader:
    """A data file that exists already: its name, size and header, and whose it is."""

    name: str
    size: int
    header: Header
    rank: int | None = None


def _tensors_onto(detection: Detection, target: Detection) -> dict[str, PlannedTensor]:
    current = {s.name: s for s in detection.stacks}
    plain = {t.name: t for t in detection.others}
    planned_tensors: dict[str, PlannedTensor] = {}
    for number, stack in enumerate(target.stacks):
        source = current.get(stack.name)
        if source is None or source.sizes != stack.sizes:
            raise _foreign(stack.name)
        made = laid_out(source, number, stack.layout, like=stack)
        planned_tensors.update((d.name, d) for d in made)
    for tensor in target.others:
        if tensor.name not in plain:
            raise _foreign(tensor.name)
        planned_tensors[tensor.name] = copied(plain[tensor.name])
    return planned_tensors


def _ledger_onto(detection: Detection, target: Detection) -> tuple[LedgerEntry, ...]:
    current = {s.name: s for s in detection.stacks}
    found = [entry for s in target.stacks for entry in ledger_entries(current[s.name], s.layout)]
    return (*copied_entries(detection), *found)


def _existing_file(file: PlacedHeader, planned_tensors: dict[str, PlannedTensor]) -> OutputFile:
    places = []
    for tensor in sorted(file.header.tensors, key=lambda t: (t.offset, t.nbytes)):
        planned = planned_tensors.get(tensor.name)
        if planned is None or planned.nbytes != tensor.nbytes or planned.dtype != tensor.dtype:
            raise _foreign(tensor.name)
        places.append((planned, tensor.offset))
    return output_file(file.name, file.header.raw, places, size=file.size, rank=file.rank)


def _foreign(name: str) -> BadManifest:
    return BadManifest(
        "the output's origin and its tensors are not of the same model",
        at=quoted(name),
        cause="one of them does not have it, or has it with another size",
    )


def plan_onto(
    detection: Detection, target: Detection, files: tuple[PlacedHeader, ...]
) -> tuple[OutputFile, ...]:
    """Plan to fill existing `files`, which hold `target`'s tensors, from those of `detection`.

    With both the same this re-reads a checkpoint unit by unit; with two checkpoints it is the
    inverse plan, under which every byte of the one can be compared with the other.
    Raises BadManifest where `detection` has nothing for a tensor.
    """
    planned_tensors = _tensors_onto(detection, target)
    return tuple(_existing_file(file, planned_tensors) for file in files)


def plan_onto_ranks(
    detection: Detection, target: Detection, manifest: Manifest, files: tuple[PlacedHeader, ...]
) -> tuple[OutputFile, ...]:
    """Plan to fill the files of an expert-parallel output, slot by slot, from `detection`.

    target: what the output holds. Raises BadManifest where `detection` has nothing for a tensor.
    """
    layouts = {s.name: s.layout for s in target.stacks}
    for stack in detection.stacks:
        if stack.name not in layouts:
            raise _foreign(stack.name)
    rows = {
        s.name: s.physical_to_logical
        for s in manifest.root.stacks
        if s.physical_to_logical is not None
    }
    common, ranks = tensors_by_rank(detection, Sharding(manifest.root.ep_size or 1, rows), layouts)
    by_rank = dict(enumerate(ranks))
    by_name = {
        rank: {d.name: d for d in (common if rank is None else by_rank[rank])}
        for rank in {f.rank for f in files}
    }
    return tuple(_existing_file(file, by_name[file.rank]) for file in files)


def plan_rereading(manifest: Manifest, files: tuple[PlacedHeader, ...]) -> tuple[OutputFile, ...]:
    """Plan to re-read the files of an expert-parallel output: every slot from its own bytes."""
    recorded = {(p.file, t.name): t.expert for p in manifest.parts for t in p.tensors}
    return tuple(
        _existing_file(
            file,
            {t.name: unchanged_tensor(t, recorded[file.name, t.name]) for t in file.header.tensors},
        )
        for file in files
    )


def unchanged_tensor(stored: StoredTensor, expert: ExpertEntry | None) -> PlannedTensor:
    """Plan to re-read a tensor in place, by its manifest entry alone: no recipe is needed."""
    if expert is None:
        return copied(stored)
    # the manifest counts blocks, not rows
    axes = parse_axes(expert.axes).without_blocks()
    experts, projections = len(expert.experts), len(expert.projections)
    sizes = stored_sizes(axes, expert.matrix, experts=experts, projections=projections)
    shape = geometry(axes, sizes)
    step = shape.expert_stride * BITS[stored.dtype] // 8

    def region(position: int) -> Region:
        return Region(stored.file, stored.offset + position * step, shape)

    return PlannedTensor(
        stored.name,
        stored.dtype,
        stored.shape,
        nbytes=shape.numel * BITS[stored.dtype] // 8,
        expert=expert,
        geometry=shape,
        keys=tuple(range(experts)),  # by position: two slots may hold one expert
        regions=tuple(ProjectionRegions(region, shape, pair) for pair in range(projections)),
    )


def unchanged_file(file: OutputFile, number: int) -> OutputFile:
    """A planned file as if it were the source, file `number` of it."""
    places = [
        (
            unchanged_tensor(
                StoredTensor(t.name, t.dtype, t.shape, number, t.offset, t.nbytes), t.expert
            ),
            t.offset,
        )
        for t in file.tensors
    ]
    return output_file(file.name, file.header, places, size=file.size, rank=file.rank)
