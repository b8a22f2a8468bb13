"""Which experts the slots of a model's tensors hold: noted at every load, compared at the next.

Notes stand with the modules that have the tensors, so that they stay when memory is replaced, and
are copied with the model; what a note says of the memory counts for that memory only.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from itertools import count
from typing import TYPE_CHECKING, Final, TypeAlias

from torch.multiprocessing.reductions import StorageWeakRef

from moeconv.errors import DoesNotFit, GeometryMismatch, quoted
from moeconv.runtime.byte_runs import Held
from moeconv.runtime.model_tensors import Target, local_tensor

if TYPE_CHECKING:
    from moeconv.runtime.shard import Shard

Memory: TypeAlias = tuple[StorageWeakRef, int, int]  # storage, offset, version
_KEY: Final = "_moeconv_notes"  # of a module's __dict__
_ORDER: Final = count()


def now() -> int:
    """A number above those of all notes so far."""
    return next(_ORDER)


@dataclass(frozen=True, slots=True)
class Note:
    """What was last loaded into a tensor of a model that holds slots.

    row: [P], the experts of the stack's slots; empty where a load ended early that changed them.
    start, stop: the slots in the tensor. weights: which set's, see `Shard.weights`. whole: whether
    that load came to its end. memory: what it filled, None in a copy of the model.
    """

    stack: str
    row: tuple[int, ...]
    start: int
    stop: int
    weights: object
    whole: bool
    memory: Memory | None
    order: int


class _Notes(dict[str, Note]):
    """The notes of a module, by the name of its parameter or buffer."""

    def __deepcopy__(self, _: dict[int, object]) -> _Notes:
        return _Notes({name: replace(note, memory=None) for name, note in self.items()})

    def __reduce__(self) -> tuple[object, ...]:  # so that a saved model does not need moeconv
        return dict, ()


def noted(target: Target) -> Note | None:
    """The note on a tensor of a model, if it was ever loaded."""
    module, name = target.places[0]
    notes = module.__dict__.get(_KEY)
    return notes.get(name) if isinstance(notes, _Notes) else None


def memory_of(target: Target) -> Memory:
    """What tells whether a tensor is the memory that it was, and unwritten since."""
    local = local_tensor(target.now())
    version = -1 if local.is_inference() else local._version
    storage = StorageWeakRef(local.untyped_storage())  # type: ignore[no-untyped-call]
    return storage, int(local.storage_offset()), version


def begin(filled: Iterable[tuple[Target, Held | None]], shard: Shard) -> None:
    """Note that tensors are being filled with what a shard has; held: which slots, if any."""
    weights = shard.weights
    for target, held in filled:
        old = noted(target)
        if held is None:
            _put(target, None)
            continue
        row = shard.rows[held.stack]
        known = row if old is None or old.row == row else ()
        note = Note(
            stack=shard.home.root.stacks[held.stack].name,
            row=known,
            start=held.start,
            stop=held.stop,
            weights=weights,
            whole=False,
            memory=None,
            order=now(),
        )
        _put(target, note)


def finish(filled: Iterable[tuple[Target, Held | None]], shard: Shard) -> None:
    """Note that they are filled."""
    for target, held in filled:
        note = noted(target)
        if held is not None and note is not None:
            row, memory = shard.rows[held.stack], memory_of(target)
            _put(target, replace(note, row=row, whole=True, memory=memory, order=now()))


def follow(tensors: Iterable[tuple[Target, Held]], shard: Shard, named: frozenset[str]) -> None:
    """Note the placement of a shard for what holds it already, though nothing was filled there.

    That is what was filled before, in slots whose experts stay: those of other ranks, or of other
    tensors of the stack, have changed.
    """
    for target, held in tensors:
        note, row = noted(target), shard.rows[held.stack]
        known = note is not None and note.whole and note.stack in named
        if note is not None and known and note.row != row:
            _put(target, replace(note, row=row, order=now()))


def _put(target: Target, note: Note | None) -> None:
    for module, name in target.places:
        notes = module.__dict__.get(_KEY)
        if note is not None:
            if not isinstance(notes, _Notes):
                notes = module.__dict__[_KEY] = _Notes()
            notes[name] = note
        elif isinstance(notes, _Notes):
            notes.pop(name, None)


def rows_of(targets: Iterable[Target]) -> dict[str, Note]:
    """A note for each stack that a model holds. Raises GeometryMismatch, DoesNotFit."""
    found: dict[str, Note] = {}
    for target in targets:
        note = noted(target)
        if note is None:
            continue
        if not note.row:
            raise ended_early(target)
        if found.setdefault(note.stack, note).row != note.row:
            raise GeometryMismatch(
                f"the model holds {quoted(note.stack)} in two placements",
                at=quoted(target.names[0]),
                cause="only some of its tensors were loaded under the newer one",
                fix=_WHOLE,
            )
    return found


def to_fill(
    tensors: Iterable[tuple[Target, Held]], shard: Shard, named: frozenset[str]
) -> dict[Target, frozenset[int]]:
    """The local slots to fill so that a model holds what `shard` says; only tensors with any.

    named: the stacks that the caller gave a placement; of others nothing is filled. Where a stack
    changes, a tensor of it is filled whole if nobody knows what is in it.
    Raises GeometryMismatch, DoesNotFit.
    """
    tensors = tuple(tensors)
    differ = {target: _differ(target, held, shard, named) for target, held in tensors}
    stacks = {held.stack for target, held in tensors if differ[target]}
    found = {
        target: frozenset(held.local) if _written_since(target) else differ[target]
        for target, held in tensors
        if held.stack in stacks and (differ[target] or _written_since(target))
    }
    weights = shard.weights
    for target in differ if found else ():
        note = noted(target)
        if note is not None and note.weights != weights:
            raise GeometryMismatch(
                "the model holds the weights of another set",
                at=quoted(target.names[0]),
                cause="what stays would keep those, what moves would get this set's",
                fix="call `replace` of the shard that was loaded last",
            )
    return found


def _differ(target: Target, held: Held, shard: Shard, named: frozenset[str]) -> frozenset[int]:
    """The local slots of a tensor that do not hold what `shard` says, or may not."""
    note, row = noted(target), shard.rows[held.stack]
    stack = shard.home.root.stacks[held.stack].name
    if note is not None and not note.whole:
        raise ended_early(target)
    if note is None or (note.stack, note.start, note.stop) != (stack, held.start, held.stop):
        return frozenset(held.local if stack in named else ())
    there = enumerate(held.local, start=held.start)
    other = frozenset(slot for at, slot in there if note.row[at] != row[at])
    if other and stack not in named:
        raise GeometryMismatch(
            f"the model holds {quoted(stack)} in another placement than this one leaves it in",
            at=quoted(target.names[0]),
            cause="it was given a placement since, and the new one does not name it",
            fix="name it in the new placement, too, or call `replace` of the last `Moves.shard`",
        )
    return other


def _written_since(target: Target) -> bool:
    note = noted(target)
    return note is None or note.memory != memory_of(target)


_WHOLE: Final = "load it whole, with `load_into` of a set in the placement that you route by"


def ended_early(target: Target) -> DoesNotFit:
    """The error for a model that a load left half written."""
    return DoesNotFit(
        f"nobody knows which experts {quoted(target.names[0])} holds",
        at=quoted(target.names[0]),
        cause="a load ended early, after its first byte",
        fix=_WHOLE,
    )
