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
_LOAD_WHOLE: Final = "load all of it: `load_into` of an output in the placement that you route by"
ORDER: Final = count()  # its next number is above those of all records so far


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


def record_load(
    tensors: Iterable[tuple[Target, SlotRange | None]], shard: RankView, *, complete: bool
) -> None:
    """Record that a load of these tensors begins, or is complete.

    Those without slots lose their record.
    """
    weights = shard.weights
    for target, slot_range in tensors:
        if slot_range is None:
            _put(target, None)
            continue
        old, row = record_of(target), shard.rows[slot_range.stack]
        known = complete or old is None or old.row == row
        record = LoadRecord(
            stack=shard.stacks[slot_range.stack],
            row=row if known else (),
            start=slot_range.start,
            stop=slot_range.stop,
            weights=weights,
            complete=complete,
            memory=memory_state(target) if complete else None,
            order=next(ORDER),
        )
        _put(target, record)


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
            _put(target, replace(record, row=row, order=next(ORDER)))


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
            raise _interrupted_load(target)
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
    found = {}
    for target, slot_range in tensors:
        if slot_range.stack in stacks:
            record = record_of(target)
            written_since = record is None or record.memory != memory_state(target)
            if slots := frozenset(slot_range.local) if written_since else differ[target]:
                found[target] = slots
    weights = shard.weights
    for target in differ if found else ():
        record = record_of(target)
        if record is not None and record.weights != weights:
            raise GeometryMismatch(
                "the model holds the weights of another output",
                at=quoted(target.names[0]),
                cause="unchanged slots would keep those weights, changed slots would get this "
                "output's",
                fix="call `replace` of the shard that was loaded last",
            )
    return found


def _differ(
    target: Target, slot_range: SlotRange, shard: RankView, named: frozenset[str]
) -> frozenset[int]:
    """The local slots of a tensor that do not, or may not, hold the experts of `shard`."""
    record, row = record_of(target), shard.rows[slot_range.stack]
    stack, start = shard.stacks[slot_range.stack], slot_range.start
    if record is not None and not record.complete:
        raise _interrupted_load(target)
    here = (stack, start, slot_range.stop)
    if record is None or (record.stack, record.start, record.stop) != here:
        return frozenset(slot_range.local if stack in named else ())
    there = enumerate(slot_range.local, start=start)
    other = frozenset(slot for at, slot in there if record.row[at] != row[at])
    if other and stack not in named:
        raise GeometryMismatch(
            f"the model holds {quoted(stack)} in a placement that differs from the new one",
            at=quoted(target.names[0]),
            cause="it was rebalanced since this shard was loaded; the new placement does not "
            "name it",
            fix="name it in the new placement too, or call `replace` of the last `Moves.shard`",
        )
    return other


def _interrupted_load(target: Target) -> DoesNotFit:
    """The error for a model that a failed load left partly written."""
    return DoesNotFit(
        f"it is not known which experts {quoted(target.names[0])} holds",
        at=quoted(target.names[0]),
        cause="a load ended early, after its first byte",
        fix=_LOAD_WHOLE,
    )
