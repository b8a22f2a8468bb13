"""Load into a model, once or repeatedly with newer outputs of the same geometry."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from math import prod

import torch

from moeconv.core.text import counted
from moeconv.errors import DoesNotFit, GeometryMismatch, quoted
from moeconv.runtime.bind import Binding, BoundTensor
from moeconv.runtime.byte_runs import LocalTensor, join_runs, run_chunks
from moeconv.runtime.dtensor import BLOCK_BYTES, counts
from moeconv.runtime.files import Reader
from moeconv.runtime.model_tensors import is_dtensor, local_tensor
from moeconv.runtime.rank_view import RankView
from moeconv.runtime.slot_records import ORDER, record_load, recorded_rows
from moeconv.runtime.write_tensors import TensorWriter


@dataclass(frozen=True, slots=True)
class Report:
    """What a load did.

    tensors: how many of the model were filled. bytes_read: all bytes that came out of files, those
    that were only compared (of names that the model ties) among them. overread: (name, bytes) of
    slices around which whole rows were read; they are among bytes_read. seconds: with the matching
    of names, where there was any. ignored: names of the output. cast: those converted to another
    dtype. tied: names of the model that another name of the same memory covers. materialised:
    parameters that were on meta. files: those that were opened.
    """

    tensors: int
    bytes_read: int
    overread: tuple[tuple[str, int], ...]
    seconds: float
    ignored: tuple[str, ...]
    tied: tuple[str, ...]
    materialised: int
    files: tuple[str, ...]
    cast: tuple[str, ...]

    @property
    def bytes_overread(self) -> int:
        """How many of the bytes read were not this rank's."""
        return sum(size for _, size in self.overread)


@dataclass(slots=True)
class Updater:
    """A model and where each tensor of an output goes in it: made by `Shard.updater`.

    For one thread at a time: it keeps the buffers that it reads into.
    """

    shard: RankView
    binding: Binding
    device: torch.device | None
    _writer: TensorWriter = field(default_factory=TensorWriter)
    _created: int = field(default_factory=lambda: next(ORDER))

    def load(self, newer: RankView) -> Report:
        """Read an output of the same geometry into the model: the same memory, no names matched.

        Where the model was given a new placement since this updater was made
        (`Moves.load_into`), it keeps that one: a newer output in the placement of the updater's is
        read as `newer.replace` of it would be, other ranks' files included. If the updater's output
        was opened with `verify=`, the newer one is verified before the first byte is written.

        Raises GeometryMismatch (other ranks, placement, names, dtypes, shapes or layouts),
        DoesNotFit (the model changed, or names that it ties have different bytes), IoFailed,
        SourceChanged (also where a file changed while it was read: then the model is not whole),
        and what `open` and `Shard.replace` raise of an output that is verified or placed anew.

        >>> updater = shard.updater(model)
        >>> updater.load(moeconv.runtime.open(OUT, ep_rank=0, ep_size=2)).tensors
        5
        """
        began = time.perf_counter()
        rows = self._rows(newer)
        _check_same(self.shard, newer)
        if self.shard.verify:
            newer = newer.verified()
        return self.write(newer.rearranged(rows) if rows else newer, began)

    def _rows(self, newer: RankView) -> dict[str, tuple[int, ...]]:
        """The rows under which the model is to get a newer output, where these are not its own.

        Raises GeometryMismatch, DoesNotFit.
        """
        known, given, rows = self.shard.placement, newer.placement, {}
        records = recorded_rows(item.target for item in self.binding.bound)
        for stack in dict.fromkeys((*known, *given)):
            record, row = records.get(stack), given.get(stack)
            if record is not None and record.row == row:
                continue
            if known.get(stack) != row:
                raise _other_placement(
                    stack, "it is neither the updater's placement nor the model's"
                )
            if record is not None and record.order < self._created:
                raise _other_placement(stack, "the model had another before the updater was made")
            if record is not None:
                rows[stack] = record.row
        return rows

    def write(self, newer: RankView, began: float) -> Report:
        """Load all matched tensors from an output of the same tensors, whatever the model holds."""
        targets, tensors = self.binding.bound, newer.tensors
        slots = [(f.target, tensors[f.source].slot_range) for f in targets]
        with torch.no_grad(), Reader(newer.files) as reader, self._writer as writer:
            # all that can be refused is, before the first byte is written
            names = [f.source for f in targets] + [other for _, other in self.binding.aliases]
            reader.open(run for name in names for run in tensors[name].runs)
            _refuse_unequal_aliases(self.binding, tensors, reader)
            self.binding.check()
            made = sum([_materialise(f, self.device) for f in targets])
            record_load(slots, newer, complete=False)
            for item in targets:
                into = item.local()
                for step in item.steps:
                    writer.step(into, step, tensors[item.source], reader)
                if not into.is_inference():  # memory was written behind autograd's back
                    torch.autograd.graph.increment_version((into, item.target.now()))
            reader.check()
            files = reader.names
        with torch.no_grad():
            record_load(slots, newer, complete=True)
        return Report(
            tensors=len(targets),
            bytes_read=reader.bytes_read,
            overread=tuple(o for f in targets if (o := _overread(f, tensors))[1]),
            seconds=time.perf_counter() - began,
            ignored=self.binding.ignored,
            tied=self.binding.tied,
            materialised=made,
            files=files,
            cast=self.binding.cast,
        )


def _check_same(known: RankView, newer: RankView) -> None:
    problems = []
    if (known.ep_rank, known.ep_size) != (newer.ep_rank, newer.ep_size):
        problems.append(f"rank {newer.ep_rank} of {newer.ep_size}")
    before = {tensor.facts() for tensor in known.tensors.values()}
    other = [tensor.name for tensor in newer.tensors.values() if tensor.facts() not in before]
    if other or len(known.tensors) != len(newer.tensors):
        problems.append(f"other tensors{': ' + quoted(other[0]) if other else ''}")
    if problems:
        raise GeometryMismatch(
            "the newer output does not have the geometry of the first",
            cause="it has " + ", ".join(problems),
            fix="make a new updater for it",
        )


def _other_placement(stack: str, cause: str) -> GeometryMismatch:
    return GeometryMismatch(
        f"the newer output has {quoted(stack)} in another placement",
        at=quoted(stack),
        cause=cause,
        fix="load it with `newer.load_into(model)` if you route by its placement, and make a new "
        "updater; otherwise load `newer.replace(...).shard` of the placement that you route by",
    )


def _refuse_unequal_aliases(
    binding: Binding, tensors: Mapping[str, LocalTensor], reader: Reader
) -> None:
    """Two names of one storage must have the same bytes. Raises DoesNotFit with all that differ."""
    unequal = [
        f"{quoted(item.source)} and {quoted(other)}"
        for item, other in binding.aliases
        if not _equal(item, tensors[item.source], tensors[other], reader)
    ]
    if unequal:
        raise DoesNotFit(
            f"the model ties {counted(len(unequal), 'pair')} of names whose bytes differ in "
            "the output",
            cause="; ".join(unequal),
            fix="untie them in the model, or name one of each pair in `ignore=`",
        )


def _equal(item: BoundTensor, a: LocalTensor, b: LocalTensor, reader: Reader) -> bool:
    if (a.dtype, a.shape) != (b.dtype, b.shape):
        return False
    if a.digest is not None and b.digest is not None:
        return a.digest == b.digest
    # no more of them than this process is going to read
    mine, others = (
        join_runs(r for step in item.steps for _, runs in step.blocks(t) for r in runs)
        for t in (a, b)
    )
    left, right = (torch.empty(BLOCK_BYTES, dtype=torch.uint8) for _ in range(2))
    sides = zip(run_chunks(mine, BLOCK_BYTES), run_chunks(others, BLOCK_BYTES), strict=True)
    for (_, here), (_, there) in sides:
        reader.into(left.data_ptr(), here)
        reader.into(right.data_ptr(), there)
        size = sum(r.nbytes for r in here)
        if not torch.equal(left[:size], right[:size]):
            return False
    return True


def _overread(item: BoundTensor, tensors: Mapping[str, LocalTensor]) -> tuple[str, int]:
    size = tensors[item.source].torch_dtype.itemsize
    more = 0
    for step in item.steps:
        rows = step.rows[1] - step.rows[0]
        read, wanted = (prod(counts(s)[1:]) for s in (step.read, step.wanted))
        more += rows * (read - wanted) * size
    return item.source, more


def _materialise(item: BoundTensor, device: torch.device | None) -> bool:
    """Give a parameter on meta memory, in all modules that have it, as it was in all else."""
    old = item.target.now()
    if not old.is_meta:
        return False
    if is_dtensor(old):
        from torch.distributed.tensor import DTensor

        new: torch.Tensor = DTensor.from_local(
            torch.empty_like(local_tensor(old), device=device or old.device_mesh.device_type),
            old.device_mesh,
            old.placements,
            run_check=False,
            shape=old.shape,
            stride=old.stride(),
        )
    else:
        new = torch.empty_like(old, device=device or "cpu")
    parameter = torch.nn.Parameter(new, requires_grad=old.requires_grad)
    parameter.__dict__.update(old.__dict__)
    for module, name in item.target.attributes:
        setattr(module, name, parameter)  # some modules (nn.LSTM) keep other references to it
    return True
