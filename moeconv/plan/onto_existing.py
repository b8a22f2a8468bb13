"""Planning onto files whose headers exist: the origin's own, or those of a checkpoint at hand."""

from __future__ import annotations

from dataclasses import dataclass

from moeconv.checkpoint.header import Header
from moeconv.checkpoint.origin import Origin
from moeconv.detect.detect import Detection
from moeconv.errors import BadManifest, quoted
from moeconv.manifest.model import Manifest
from moeconv.plan.convert import copied_fates, prove, stack_entry
from moeconv.plan.identity import from_itself
from moeconv.plan.model import Fate, OutputFile, Plan
from moeconv.plan.pack import output_file
from moeconv.plan.shard import Sharding, drafts_of
from moeconv.plan.tensors import Draft, copied, fates, laid_out


def plan_restore(detection: Detection, original: Detection, origin: Origin) -> Plan:
    """The origin's own files, byte for byte, from the tensors of one of our sets.

    detection: the set as it is; original: what the origin's headers spell, in its own layouts.
    Raises BadManifest where the two are not the same model.
    """
    drafts = _drafts_onto(detection, original)
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
        stacks=tuple(stack_entry(s, s.layout, {}) for s in original.stacks),
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


def _drafts_onto(detection: Detection, target: Detection) -> dict[str, Draft]:
    current = {s.name: s for s in detection.stacks}
    plain = {t.name: t for t in detection.others}
    drafts: dict[str, Draft] = {}
    for number, stack in enumerate(target.stacks):
        source = current.get(stack.name)
        if source is None or source.sizes != stack.sizes:
            raise _foreign(stack.name)
        made = laid_out(source, number, stack.layout, like=stack)
        drafts.update((d.name, d) for d in made)
    for tensor in target.others:
        if tensor.name not in plain:
            raise _foreign(tensor.name)
        drafts[tensor.name] = copied(plain[tensor.name])
    return drafts


def _ledger_onto(detection: Detection, target: Detection) -> tuple[Fate, ...]:
    current = {s.name: s for s in detection.stacks}
    found = [fate for s in target.stacks for fate in fates(current[s.name], s.layout)]
    return (*copied_fates(detection), *found)


def _existing_file(file: PlacedHeader, drafts: dict[str, Draft]) -> OutputFile:
    places = []
    for tensor in sorted(file.header.tensors, key=lambda t: (t.offset, t.nbytes)):
        draft = drafts.get(tensor.name)
        if draft is None or draft.nbytes != tensor.nbytes or draft.dtype != tensor.dtype:
            raise _foreign(tensor.name)
        places.append((draft, tensor.offset))
    return output_file(file.name, file.header.raw, places, size=file.size, rank=file.rank)


def _foreign(name: str) -> BadManifest:
    return BadManifest(
        "the set's origin and its tensors are not of the same model",
        at=quoted(name),
        cause="one of them has it, the other does not, or of another size",
    )


def plan_onto(
    detection: Detection, target: Detection, files: tuple[PlacedHeader, ...]
) -> tuple[OutputFile, ...]:
    """Existing `files`, whose tensors are `target`'s, as if filled from the tensors of `detection`.

    With both the same this re-reads a checkpoint unit by unit; with two checkpoints it is the
    inverse plan, under which every byte of the one can be held against the other.
    Raises BadManifest where `detection` has nothing for a tensor.
    """
    drafts = _drafts_onto(detection, target)
    return tuple(_existing_file(file, drafts) for file in files)


def plan_onto_set(
    detection: Detection, target: Detection, manifest: Manifest, files: tuple[PlacedHeader, ...]
) -> tuple[OutputFile, ...]:
    """The files of an expert-parallel set, every slot of them, as if filled from `detection`.

    target: what the set holds. Raises BadManifest where `detection` has nothing for a tensor.
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
    common, ranks = drafts_of(detection, Sharding(manifest.root.ep_size or 1, rows), layouts)
    by_rank = dict(enumerate(ranks))
    by_name = {
        rank: {d.name: d for d in (common if rank is None else by_rank[rank])}
        for rank in {f.rank for f in files}
    }
    return tuple(_existing_file(file, by_name[file.rank]) for file in files)


def plan_onto_itself(manifest: Manifest, files: tuple[PlacedHeader, ...]) -> tuple[OutputFile, ...]:
    """The files of an expert-parallel set filled from themselves: every slot from its own bytes."""
    said = {(p.file, t.name): t.expert for p in manifest.parts for t in p.tensors}
    return tuple(
        _existing_file(
            file, {t.name: from_itself(t, said[file.name, t.name]) for t in file.header.tensors}
        )
        for file in files
    )
