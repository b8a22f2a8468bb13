"""Change the placement of a loaded model: read only the slots whose expert changes."""

from __future__ import annotations

import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import chain
from typing import Generic, TypeVar

import torch

from moeconv.errors import DoesNotFit, quoted
from moeconv.runtime.bind import Binding, Rename, bind
from moeconv.runtime.byte_runs import LocalTensor, equal_part, join_runs
from moeconv.runtime.rank_view import RankView
from moeconv.runtime.slot_records import record_placement, slots_to_load
from moeconv.runtime.updater import Report, Updater
from moeconv.runtime.write_tensors import load_tensors

ViewT = TypeVar("ViewT", bound=RankView)


@dataclass(frozen=True, slots=True, eq=False, repr=False)
class Moves(Generic[ViewT]):
    """What a new placement changes on one rank. changed: (local slot, expert) by stack.

    `changed` is counted from the placement of the shard whose `replace` made it. shard: the rank
    under the new placement; what it lacks comes out of other ranks' files. named: the stacks that
    the new placement names.
    """

    shard: ViewT
    changed: dict[str, tuple[tuple[int, int], ...]]
    named: frozenset[str]

    def _touched(self) -> list[tuple[LocalTensor, tuple[int, ...]]]:
        """The tensors with slots that change, and those slots."""
        number = {name: n for n, name in enumerate(self.shard.stacks)}
        changed = {number[s]: {slot for slot, _ in pairs} for s, pairs in self.changed.items()}
        out = []
        for tensor in self.shard.tensors.values():
            if (slots := tensor.slot_range) is not None:
                mine = changed.get(slots.stack, set()).intersection(slots.local)
                out += [(tensor, tuple(sorted(mine)))] if mine else []
        return out

    def load(
        self, device: torch.device | str | None = None, *, copy: bool = False
    ) -> dict[str, tuple[tuple[int, ...], torch.Tensor]]:
        """The slots in `changed` only: {name: (local slots, their values in that order)}.

        Where a layout names each slot, the tensor is that of the one slot. copy: as in
        `Shard.load`. Nothing is known here of the model that they are for: call `replace` of the
        shard that it holds.
        Raises SourceChanged, IoFailed, NoTorchDtype.

        >>> moves = shard.replace({"model.layers.0.mlp.experts": (2, 0, 3, 4, 1, 0)})
        >>> slots, values = moves.load()["model.layers.0.mlp.experts.down_proj"]
        >>> slots, values.shape
        ((2,), torch.Size([1, 8, 4]))
        """
        parts = {t.name: (slots, _slots_of(t, slots)) for t, slots in self._touched()}
        values = load_tensors(
            (part for _, part in parts.values()), self.shard.files, device, copy=copy
        )
        return {name: (slots, values[name]) for name, (slots, _) in parts.items()}

    def load_into(
        self,
        model: torch.nn.Module,
        *,
        rename: Rename = None,
        ignore: Iterable[str] = (),
        cast: bool = False,
    ) -> Report:
        """Read into a model the slots whose expert changes, nothing else.

        Which experts the model holds is recorded at every load (`load_into`, `Updater.load`): what
        differs from that is read, whatever placement this one was made from. All slots of the
        named stacks are read where there is no such record, or the memory was replaced or written
        to since. Options are those of `Shard.load_into`; the model may have other tensors.

        Raises DoesNotFit (a load into the model ended early, among others) and GeometryMismatch
        (the model holds another output's weights, or a stack that is not named in another
        placement) before the first byte is written, SourceChanged, IoFailed.
        """
        began, shard = time.perf_counter(), self.shard
        slots = {tensor.name: tensor for tensor in shard.tensors.values() if tensor.slot_range}
        needed = {tensor.name for tensor, _ in self._touched()}
        with torch.no_grad():
            binding = bind(model, slots, rename=rename, ignore=ignore, cast=cast, needed=needed)
            pairs = [(f.target, s) for f in binding.bound if (s := slots[f.source].slot_range)]
            _refuse_untied(binding, slots, shard)
            wanted = slots_to_load(pairs, shard, self.named)
        items = {
            f.target: f.only(wanted[f.target], slots[f.source])
            for f in binding.bound
            if f.target in wanted
        }
        aliases = tuple((items[f.target], n) for f, n in binding.aliases if f.target in items)
        binding = replace(binding, bound=tuple(items.values()), aliases=aliases)
        report = Updater(shard, binding, None).write(shard, began)
        record_placement(pairs, shard, self.named)
        return report


def _refuse_untied(binding: Binding, slots: Mapping[str, LocalTensor], shard: RankView) -> None:
    """Raise DoesNotFit where one memory would have to hold different experts for two stacks."""

    def experts(name: str) -> tuple[int, ...]:
        held = slots[name].slot_range
        return shard.rows[held.stack][held.start : held.stop] if held else ()

    for item, other in binding.aliases:
        if experts(item.source) != experts(other):
            raise DoesNotFit(
                f"the model ties {quoted(item.source)} and {quoted(other)}",
                at=quoted(item.target.names[0]),
                cause="the new placement gives their slots different experts",
                fix="give both stacks the same placement, or untie them in the model",
            )


def _slots_of(tensor: LocalTensor, slots: Sequence[int]) -> LocalTensor:
    """Some of its slots, counted within the rank, as a tensor without a place on a rank."""
    held = tensor.slot_range
    if held is None or not held.stacked:
        return tensor
    count = len(held.local)
    parts = [equal_part(tensor.runs, slot - held.local.start, count) for slot in slots]
    shape = (tensor.shape[0] // count * len(slots), *tensor.shape[1:])
    return LocalTensor(replace(tensor.entry, shape=shape), join_runs(chain.from_iterable(parts)))
