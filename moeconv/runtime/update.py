"""Filling a model, once or again and again with newer sets of the same geometry."""

from __future__ import annotations

import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from math import prod
from typing import TYPE_CHECKING, TypeAlias

import torch

from moeconv.errors import DoesNotFit, GeometryMismatch, quoted
from moeconv.manifest import Run
from moeconv.runtime.files import Reader
from moeconv.runtime.fill import Filler, portions
from moeconv.runtime.fit import Filled, Fit, fit, is_dtensor, local_tensor
from moeconv.runtime.slices import BLOCK_BYTES, Block, counts
from moeconv.runtime.tensors import LocalTensor

if TYPE_CHECKING:
    from moeconv.runtime.fit import Rename
    from moeconv.runtime.shard import Shard

Found: TypeAlias = tuple[tuple[tuple[Block, tuple[Run, ...]], ...], ...]  # blocks of each step


@dataclass(frozen=True, slots=True)
class Report:
    """What a load did.

    tensors: how many of the model were filled. bytes_read: all bytes that came out of files;
    overread: (name, bytes) of slices around which whole rows were read, because their own pieces
    were too small; they are among bytes_read. ignored: names of the set. tied: names of the model
    that another name of the same storage covers. materialised: parameters that were on meta.
    files: those that were opened.
    """

    tensors: int
    bytes_read: int
    overread: tuple[tuple[str, int], ...]
    seconds: float
    ignored: tuple[str, ...]
    tied: tuple[str, ...]
    materialised: int
    files: tuple[str, ...]

    @property
    def bytes_overread(self) -> int:
        """How many of the bytes read were not this rank's."""
        return sum(size for _, size in self.overread)


@dataclass(slots=True)
class Updater:
    """A model and where each tensor of a set goes in it: made by `Shard.updater`."""

    shard: Shard
    fitted: Fit
    device: torch.device | None
    _filler: Filler = field(default_factory=Filler)
    _found: dict[str, tuple[tuple[Run, ...], Found]] = field(default_factory=dict)

    def load(self, newer: Shard) -> Report:
        """Read a set of the same geometry into the model: the same memory, no names matched.

        Offsets are taken over where they are the same, and found again where they are not.
        Raises GeometryMismatch (other ranks, placement, names, dtypes or shapes), DoesNotFit (the
        model changed, or names that it ties have different bytes), IoFailed, SourceChanged.

        >>> updater = shard.updater(model)
        >>> updater.load(moeconv.runtime.open(OUT, ep_rank=0, ep_size=2)).tensors
        5
        """
        began = time.perf_counter()
        _check_same(self.shard, newer)
        with torch.no_grad(), Reader(newer.files) as reader:
            # apart, since what is only compared is not counted
            with Reader(newer.files) as comparing:
                check_twins(self.fitted, newer.tensors, comparing)
            targets = self.fitted.filled
            made = sum([_materialise(f, self.device) for f in targets])
            memory = [f.local() for f in targets]
            with self._filler as filler:
                for item, into in zip(targets, memory, strict=True):
                    tensor = newer.tensors[item.source]
                    dtype = tensor.torch_dtype
                    for step, blocks in zip(item.steps, self._blocks(item, tensor), strict=True):
                        filler.step(into, step, blocks, dtype, reader)
                    if not into.is_inference():  # memory was written behind autograd's back
                        torch.autograd.graph.increment_version((into, item.target.now()))
            return Report(
                tensors=len(targets),
                bytes_read=reader.bytes_read,
                overread=tuple(o for f in targets if (o := _overread(f, newer.tensors))[1]),
                seconds=time.perf_counter() - began,
                ignored=self.fitted.ignored,
                tied=self.fitted.tied,
                materialised=made,
                files=reader.names,
            )

    def _blocks(self, item: Filled, tensor: LocalTensor) -> Found:
        known = self._found.get(item.source)
        if known is None or known[0] != tensor.runs:
            known = tensor.runs, tuple(step.blocks(tensor) for step in item.steps)
            self._found[item.source] = known
        return known[1]


def make_updater(
    shard: Shard,
    model: torch.nn.Module,
    *,
    rename: Rename,
    ignore: Iterable[str],
    cast: bool,
    device: torch.device | str | None,
) -> Updater:
    """Match a shard with a model; nothing is read but what ties make necessary."""
    with torch.no_grad(), Reader(shard.files) as reader:
        fitted = fit(model, shard.tensors, rename=rename, ignore=ignore, cast=cast)
        check_twins(fitted, shard.tensors, reader)
    return Updater(shard, fitted, None if device is None else torch.device(device))


def _check_same(known: Shard, newer: Shard) -> None:
    problems = []
    if (known.ep_rank, known.ep_size) != (newer.ep_rank, newer.ep_size):
        problems.append(f"rank {newer.ep_rank} of {newer.ep_size}")
    if known.placement != newer.placement:
        problems.append("another placement")
    before = {tensor.facts() for tensor in known.tensors.values()}
    other = [tensor.name for tensor in newer.tensors.values() if tensor.facts() not in before]
    if other or len(known.tensors) != len(newer.tensors):
        problems.append(f"other tensors{': ' + quoted(other[0]) if other else ''}")
    if problems:
        raise GeometryMismatch(
            "the newer set is not of the geometry of the first",
            cause="it has " + ", ".join(problems),
            fix="make a new updater for it",
        )


def check_twins(fitted: Fit, tensors: Mapping[str, LocalTensor], reader: Reader) -> None:
    """Two names of one storage must have the same bytes. Raises DoesNotFit with all that differ."""
    unequal = [
        f"{quoted(a)} and {quoted(b)}"
        for a, b in fitted.twins
        if not _equal(tensors[a], tensors[b], reader)
    ]
    if unequal:
        raise DoesNotFit(
            f"the model ties {len(unequal):,} pair(s) of names whose bytes differ in the set",
            cause="; ".join(unequal),
            fix="untie them in the model, or name one of each pair in `ignore=`",
        )


def _equal(a: LocalTensor, b: LocalTensor, reader: Reader) -> bool:
    if a.facts()[1:] != b.facts()[1:]:
        return False
    if a.digest is not None and b.digest is not None:
        return a.digest == b.digest
    sides = zip(portions(a.runs, BLOCK_BYTES), portions(b.runs, BLOCK_BYTES), strict=True)
    for (_, left), (_, right) in sides:
        both = [
            torch.empty(sum(r.nbytes for r in runs), dtype=torch.uint8) for runs in (left, right)
        ]
        for buffer, runs in zip(both, (left, right), strict=True):
            reader.into(buffer.data_ptr(), runs)
        if not torch.equal(*both):
            return False
    return True


def _overread(item: Filled, tensors: Mapping[str, LocalTensor]) -> tuple[str, int]:
    size = tensors[item.source].torch_dtype.itemsize
    more = 0
    for step in item.steps:
        rows = step.rows[1] - step.rows[0]
        read, wanted = (prod(counts(s)[1:]) for s in (step.read, step.wanted))
        more += rows * (read - wanted) * size
    return item.source, more


def _materialise(item: Filled, device: torch.device | None) -> bool:
    """Give a parameter on meta memory, in all modules that have it, as it was in all else."""
    old = item.target.now()
    if not old.is_meta:
        return False
    local = local_tensor(old)
    if is_dtensor(old):
        from torch.distributed.tensor import DTensor

        memory = torch.empty(
            local.shape, dtype=old.dtype, device=device or old.device_mesh.device_type
        )
        new: torch.Tensor = DTensor.from_local(
            memory,
            old.device_mesh,
            old.placements,
            run_check=False,
            shape=old.shape,
            stride=old.stride(),
        )
    else:
        new = torch.empty(old.shape, dtype=old.dtype, device=device or "cpu")
    parameter = torch.nn.Parameter(new, requires_grad=old.requires_grad)
    parameter.__dict__.update(old.__dict__)
    for module, name in item.target.places:
        module._parameters[name] = parameter
    return True
