"""Tensors as runs of bytes in files, from which views, slices and new placements are made."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import accumulate
from math import prod
from typing import Final, TypeAlias

import torch

from moeconv.core.dtypes import BITS
from moeconv.errors import NoTorchDtype, quoted
from moeconv.manifest.model import ExpertEntry, Run, TensorEntry, append_run

ComponentKey: TypeAlias = tuple[int, tuple[str, ...], str]  # stack number, projections, component

_TORCH: Final = {
    "BOOL": "bool", "U8": "uint8", "I8": "int8", "I16": "int16", "U16": "uint16", "I32": "int32",
    "U32": "uint32", "I64": "int64", "U64": "uint64", "F16": "float16", "BF16": "bfloat16",
    "F32": "float32", "F64": "float64", "C64": "complex64", "F8_E5M2": "float8_e5m2",
    "F8_E4M3": "float8_e4m3fn", "F8_E5M2FNUZ": "float8_e5m2fnuz",
    "F8_E4M3FNUZ": "float8_e4m3fnuz", "F8_E8M0": "float8_e8m0fnu", "F4": "float4_e2m1fn_x2",
}  # fmt: skip


@dataclass(frozen=True, slots=True)
class SlotRange:
    """Which slots a tensor holds: physical ones from `start` to before `stop`, of `total` (P).

    rank_start: the rank's first slot. stacked: whether they are along dimension 0; else the tensor
    is that of one slot.
    """

    stack: int
    start: int
    stop: int
    total: int
    rank_start: int
    stacked: bool

    @property
    def local(self) -> range:
        """The same slots, counted within the rank."""
        return range(self.start - self.rank_start, self.stop - self.rank_start)


@dataclass(frozen=True, slots=True)
class LocalTensor:
    """A tensor as this rank has it; `runs` are its bytes in order, by the shard's file numbers.

    entry: as in the manifest, with the name and shape that it has on this rank.
    """

    entry: TensorEntry
    runs: tuple[Run, ...]
    slot_range: SlotRange | None = None

    @property
    def name(self) -> str:
        """Its name on this rank."""
        return self.entry.name

    @property
    def dtype(self) -> str:
        """Its dtype, as safetensors writes it."""
        return self.entry.dtype

    @property
    def shape(self) -> tuple[int, ...]:
        """Its shape, in values of its dtype."""
        return self.entry.shape

    @property
    def digest(self) -> str | None:
        """The digest of all its bytes, where the manifest has one for the whole tensor."""
        entry = self.entry
        return entry.digests[0] if entry.expert is None and entry.digests else None

    @property
    def nbytes(self) -> int:
        """Its size in bytes."""
        return prod(self.shape) * BITS[self.dtype] // 8

    @property
    def torch_dtype(self) -> torch.dtype:
        """Its dtype in torch. Raises NoTorchDtype."""
        found = getattr(torch, _TORCH.get(self.dtype, ""), None)
        if not isinstance(found, torch.dtype) or (self.dtype == "F4" and not self._whole_pairs):
            raise NoTorchDtype(
                f"torch {torch.__version__} has no dtype for {quoted(self.name)}",
                at=quoted(self.name),
                cause=f"it is {self.dtype} {list(self.shape)}",
                fix="exclude it with `ignore=`, or `names=` of `load()`",
            )
        return found

    @property
    def _whole_pairs(self) -> bool:
        return bool(self.shape) and self.shape[-1] % 2 == 0

    @property
    def torch_shape(self) -> tuple[int, ...]:
        """Its shape in torch, where two F4 values are one element."""
        return (*self.shape[:-1], self.shape[-1] // 2) if self.dtype == "F4" else self.shape

    def facts(self) -> tuple[object, ...]:
        """What another version of the same tensor must share."""
        expert = self.entry.expert
        meaning = None if expert is None else (component_key(expert), expert.axes)
        return self.name, self.dtype, self.shape, meaning


def component_key(expert: ExpertEntry) -> ComponentKey:
    """Identify a tensor within its stack, regardless of slots."""
    return expert.stack, expert.projections, expert.component


def join_runs(runs: Iterable[Run]) -> tuple[Run, ...]:
    """The same bytes in as few runs as can be."""
    out: list[Run] = []
    for run in runs:
        if run.nbytes:
            append_run(out, run)
    return tuple(out)


def slice_runs(runs: tuple[Run, ...], pieces: Iterable[tuple[int, int]]) -> tuple[Run, ...]:
    """The runs of some of the bytes of `runs`: pieces are (start, stop), in the order wanted."""
    starts = list(accumulate((r.nbytes for r in runs), initial=0))
    out = []
    for first, stop in pieces:
        at, start = bisect_right(starts, first) - 1, first
        while start < stop:
            run, skipped = runs[at], start - starts[at]
            size = min(run.nbytes - skipped, stop - start)
            out.append(Run(run.file, run.offset + skipped, size))
            start += size
            at += 1
    return join_runs(out)


def run_chunks(runs: tuple[Run, ...], limit: int) -> Iterator[tuple[int, tuple[Run, ...]]]:
    """(bytes before, runs) of portions of at most `limit` bytes."""
    total = sum(r.nbytes for r in runs)
    for start in range(0, total, limit):
        yield start, slice_runs(runs, [(start, min(start + limit, total))])


def equal_part(runs: tuple[Run, ...], number: int, count: int) -> tuple[Run, ...]:
    """The runs of one of `count` equal parts."""
    size = sum(r.nbytes for r in runs) // count
    return slice_runs(runs, [(number * size, (number + 1) * size)])
