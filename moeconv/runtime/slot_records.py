"""Records of which experts a model's tensors hold, made at every load and compared at the next.

Records are kept with the modules that own the tensors, so that they survive when memory is
replaced, and are copied with the model; what a record says of memory is for that memory only.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from itertools import count
from typing import Final, TypeAlias

from torch.multiprocessing.reductions import StorageWeakRef

from moeconv.errors import DoesNotFit, GeometryMismatch, quoted
from moeconv.runtime.byte_runs import SlotRange
from moeconv.runtime.model_tensors import Target, local_tensor
from moeconv.runtime.rank_view import RankView

Memory: TypeAlias = tuple[StorageWeakRef, int, int]  # storage, offset, version
_KEY: Final = "_moeconv_loads"  # of a module's __dict__
_ORDER: Final = count()


def next_order() -> int:
    """A number above those of all records so far."""
    return next(_ORDER)


@dataclass(frozen=True, slots=True)
class LoadRecord:
    """What was last loaded into a tensor of a model that holds slots.

    row: physical_to_logical of the stack, [P]; empty after a load that would have changed it and
    ended early. start, stop: the slots in the tensor. weights: of which output, see
    `Shard.weights`. complete: whether that load ended well. memory: what it filled, None in a copy
    of the model. order: larger than that of all earlier records.
    """

    stack: str
    row: tuple[int, ...]
    start: int
    stop: int
    weights: object
    complete: bool
    memory: Memory | None
    order: int


class _Records(dict[str, LoadRecord]):
    """The records of a module, by the name of its parameter or buffer."""

    def __deepcopy__(self, _: dict[int, object]) -> _Records:
        return _Records({name: replace(record, memory=None) for name, record in self.items()})

    def __reduce__(self) -> tuple[object, ...]:  # so that a saved model does not need moeconv
        return dict, ()


def record_of(target: Target) -> LoadRecord | None:
    """The record of a tensor of a model, or None if it was never loaded."""
    module, name = target.attributes[0]
    records = module.__dict__.get(_KEY)
    return records.get(name) if isinstance(records, _Records) else None


def memory_state(target: Target) -> Memory:
    """Identify a tensor's memory and its version, to detect replacement and later writes."""
    local = local_tensor(target.now())
    version = -1 if local.is_inference() else local._version
    storage = StorageWeakRef(local.untyped_storage())  # type: ignore[no-untyped-call]
    return storage, int(local.storage_offset()), version


def start_records(tensors: Iterable[tuple[Target, SlotRange | None]], shard: RankView) -> None:
    """Record that a load of these tensors begins; those without slots lose their record."""
    weights = shard.weights
    for target, slot_range in tensors:
        old = record_of(target)
        if slot_range is None:
            _put(target, None)
            continue
        row = shard.rows[slot_range.stack]
        known = row if old is None or old.row == row else ()
        record = LoadRecord(
            stack=shard.output.root.stacks[slot_range.stack].name,
            row=known,
            start=slot_range.start,
            stop=slot_range.stop,
            weights=weights,
            complete=False,
            memory=None,
            order=next_order(),
        )
        _put(target, record)


def finish_records(tensors: Iterable[tuple[Target, SlotRange | None]], shard: RankView) -> None:
    """Record that the load of these tensors is complete."""
    for target, slot_range in tensors:
        record = record_of(target)
        if slot_range is not None and record is not None:
            row, memory = shard.rows[slot_range.stack], memory_state(target)
            _put(target, replace(record, row=row, complete=True, memory=memory, order=next_order()))


def record_placement(
    tensors: Iterable[tuple[Target, SlotRange]], shard: RankView, named: frozenset[str]
) -> None:
    """Record a shard's placement for tensors whose own slots did not change.

    Only slots of other ranks, or of other tensors of the stack, have new experts.
    """
    for target, slot_range in tensors:
        record, row = record_of(target), shard.rows[slot_range.stack]
        known = record is not None and record.complete and record.stack in named
        if record is not None and known and record.row != row:
            _put(target, replace(record, row=row, order=next_order()))


def _put(target: Target, record: LoadRecord | None) -> None:
    for module, name in target.attributes:
        records = module.__dict__.get(_KEY)
        if record is not None:
            if not isinstance(records, _Records):
                records = module.__dict__[_KEY] = _Records()
            records[name] = record
        elif isinstance(records, _Records):
            records.pop(name, None)


def recorded_rows(targets: Iterable[Target]) -> dict[str, LoadRecord]:
    """The record of each stack that a model holds. Raises GeometryMismatch, DoesNotFit."""
    found: dict[str, LoadRecord] = {}
    for target in targets:
        record = record_of(target)
        if record is None:
            continue
        if not record.row:
            raise interrupted_load(target)
        if found.setdefault(record.stack, record).row != record.row:
            raise GeometryMismatch(
                f"the model holds {quoted(record.stack)} in two placements",
                at=quoted(target.names[0]),
                cause="only some of its tensors were loaded under the newer one",
                fix=_LOAD_WHOLE,
            )
    return found


def slots_to_load(
    tensors: Iterable[tuple[Target, SlotRange]], shard: RankView, named: frozenset[str]
) -> dict[Target, frozenset[int]]:
    """The local slots to load so that a model has the placement of `shard`, for tensors with any.

    named: the stacks that the caller gave a placement; nothing of others is loaded. If a stack
    changes, all slots of its tensors with unknown contents are loaded.
    Raises GeometryMismatch, DoesNotFit.
    """
    tensors = tuple(tensors)
    differ = {target: _differ(target, slot_range, shard, named) for target, slot_range in tensors}
    stacks = {slot_range.stack for target, slot_range in tensors if differ[target]}
    found = {
        target: frozenset(slot_range.local) if _written_since(target) else differ[target]
        for target, slot_range in tensors
        if slot_range.stack in stacks and (differ[target] or _written_since(target))
    }
    weights = shard.weights
    for target in differ if found else ():
        record = record_of(target)
        if record is not None and record.weights != weights:
            raise GeometryMismatch(
                "the model holds the weights of another output",
                at=quoted(target.names[0]),
                cause="slots that stay would keep those, slots that change would get this output's",
                fix="call `replace` of the shard that was loaded last",
            )
    return found


def _differ(
    target: Target, slot_range: SlotRange, shard: RankView, named: frozenset[str]
) -> frozenset[int]:
    """The local slots of a tensor that do not, or may not, hold the experts of `shard`."""
    record, row = record_of(target), shard.rows[slot_range.stack]
    stack = shard.output.root.stacks[slot_range.stack].name
    if record is not None and not record.complete:
        raise interrupted_load(target)
    if record is None or (record.stack, record.start, record.stop) != (
        stack,
        slot_range.start,
        slot_range.stop,
    ):
        return frozenset(slot_range.local if stack in named else ())
    there = enumerate(slot_range.local, start=slot_range.start)
    other = frozenset(slot for at, slot in there if record.row[at] != row[at])
    if other and stack not in named:
        raise GeometryMismatch(
            f"the model holds {quoted(stack)} in a placement that differs from the new one",
            at=quoted(target.names[0]),
            cause="it was moved since this shard was loaded; the new placement does not name it",
            fix="name it in the new placement too, or call `replace` of the last `Moves.shard`",
        )
    return other


def _written_since(target: Target) -> bool:
    record = record_of(target)
    return record is None or record.memory != memory_state(target)


_LOAD_WHOLE: Final = "load all of it: `load_into` of an output in the placement that you route by"


def interrupted_load(target: Target) -> DoesNotFit:
    """The error for a model that a failed load left partly written."""
    return DoesNotFit(
        f"it is not known which experts {quoted(target.names[0])} holds",
        at=quoted(target.names[0]),
        cause="a load ended early, after its first byte",
        fix=_LOAD_WHOLE,
    )
