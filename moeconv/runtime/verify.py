"""`open(..., verify="digest")`: every byte that this rank will use, held against the manifest."""

from __future__ import annotations

import ctypes
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from math import prod
from typing import Final

import torch

from moeconv.core.digest import digest, hasher
from moeconv.core.dtypes import BITS
from moeconv.core.text import listed
from moeconv.errors import Damaged, DigestsMissing, quoted
from moeconv.layout.axes import EXPERT, PAIR, canonical_order
from moeconv.manifest.model import Run, StackEntry, TensorEntry, addresses
from moeconv.runtime.byte_runs import equal_part, run_chunks
from moeconv.runtime.files import PIECE_BYTES, THREADS, DataFile, Reader
from moeconv.runtime.open import LocatedTensor
from moeconv.runtime.validate import sizes_of

_SHOWN: Final = 20


@dataclass(frozen=True, slots=True)
class _Order:
    """Where the matrices of a stored tensor are in it.

    sizes: of its axes, slowest first. item: bytes of what an axis counts. front: E and G, as
    far as it has them, by their place among the axes; own: those of one matrix, canonical.
    """

    sizes: tuple[int, ...]
    item: int
    front: tuple[int, ...]
    own: tuple[int, ...]

    @property
    def contiguous(self) -> bool:
        """Whether the matrices follow one another, each in canonical order."""
        return (*self.front, *self.own) == tuple(range(len(self.sizes)))


def check_digests(
    tensors: Iterable[LocatedTensor], stacks: tuple[StackEntry, ...], files: Mapping[int, DataFile]
) -> None:
    """Read all bytes of some tensors and hold them against their digests (FORMAT.md, section 1).

    Raises DigestsMissing where nobody has taken them, Damaged naming what differs, IoFailed,
    SourceChanged, BadManifest.
    """
    chosen = tuple(tensors)
    if unread := [s.entry.name for s in chosen if not s.entry.digests]:
        raise DigestsMissing(
            f"{len(unread):,} tensor(s) of this rank have no digest",
            at=quoted(unread[0]),
            cause="the output is virtual, or was written with `--digests later`",
            fix="`moeconv verify --level source --source SRC --fill` adds them",
        )
    jobs = [(stored.entry, tuple(_jobs(stored))) for stored in chosen]
    wrong: list[str] = []
    with Reader(files) as reader:
        reader.open(run for stored in chosen for run in stored.runs)
        pool = ThreadPoolExecutor(THREADS)
        try:
            found = pool.map(_Read(reader), (job for _, several in jobs for job in several))
            for entry, several in jobs:
                fresh = _for_each(entry, [value for _ in several for value in next(found)])
                named = zip(addresses(entry, stacks), fresh, entry.digests, strict=True)
                wrong += [
                    f"{quoted(address)} in {quoted(entry.name)}"
                    for address, now, promised in named
                    if now != promised
                ]
        finally:
            pool.shutdown(wait=True, cancel_futures=True)
        reader.check()
    if wrong:
        raise Damaged(
            f"{len(wrong):,} of this rank's matrices are not as they were written",
            at=wrong[0],
            cause="their bytes have other digests: " + listed(wrong, most=_SHOWN, separator="; "),
            fix="`moeconv verify` names the files; fetch them again, or convert again",
        )


def single_slot(stored: LocatedTensor, number: int) -> LocatedTensor:
    """The slot at a position of a rank's tensor, with its own digests, as a tensor of its own."""
    entry, expert = stored.entry, stored.entry.expert
    if expert is None or expert.slots is None or len(expert.experts) == 1:
        return stored
    count, first = len(expert.experts), expert.slots[0] + number
    units = len(entry.digests) // count
    one = replace(expert, experts=(expert.experts[number],), slots=(first, first + 1))
    shape = (entry.shape[0] // count, *entry.shape[1:])
    digests = entry.digests[number * units : (number + 1) * units]
    alone = replace(entry, shape=shape, digests=digests, expert=one)
    return LocatedTensor(alone, equal_part(stored.runs, number, count))


@dataclass(frozen=True, slots=True)
class _Job:
    """Some bytes and the matrices in them. order: None where they are one matrix, in order."""

    runs: tuple[Run, ...]
    order: _Order | None


def _jobs(stored: LocatedTensor) -> Iterator[_Job]:
    """Small jobs wherever matrices or experts follow one another."""
    order, runs = _order(stored.entry), stored.runs
    if order is None:
        yield _Job(runs, None)
    elif order.contiguous:
        count = prod(order.sizes[: len(order.front)])
        yield from (_Job(equal_part(runs, n, count), None) for n in range(count))
    elif order.front[:1] == (0,):
        # experts or, where one expert has it, projections are slowest
        one = replace(order, sizes=(1, *order.sizes[1:]))
        count = order.sizes[0]
        yield from (_Job(equal_part(runs, n, count), one) for n in range(count))
    else:
        yield _Job(runs, order)


def _for_each(entry: TensorEntry, values: list[str]) -> list[str]:
    """The values for all experts and projections, of a tensor that may lack E, G or both."""
    expert = entry.expert
    if expert is None:
        return values
    letters = sizes_of(entry, expert)
    experts, pair = range(len(expert.experts)), range(len(expert.projections))
    step = len(pair) if PAIR in letters else 1
    return [
        values[(e * step if EXPERT in letters else 0) + (g if PAIR in letters else 0)]
        for e in experts
        for g in pair
    ]


def _order(entry: TensorEntry) -> _Order | None:
    """None for what is one matrix. Raises BadManifest where axes and shape do not agree."""
    expert = entry.expert
    if expert is None:
        return None
    sizes, bits = sizes_of(entry, expert), BITS[entry.dtype]
    letters = list(sizes)
    if bits % 8 and letters:  # several values in a byte: the fastest axis is counted in bytes
        sizes[letters[-1]] = sizes[letters[-1]] * bits // 8
    return _Order(
        sizes=tuple(sizes.values()),
        item=max(bits // 8, 1),
        front=tuple(letters.index(c) for c in (EXPERT, PAIR) if c in letters),
        own=tuple(letters.index(c) for c in canonical_order(letters)),
    )


@dataclass(frozen=True, slots=True)
class _Read:
    """Takes the digests of a job; several threads do so at once."""

    reader: Reader

    def __call__(self, job: _Job) -> list[str]:
        """Digests of its matrices, experts first, then projections."""
        total = sum(r.nbytes for r in job.runs)
        if job.order is not None:
            memory = torch.empty(total, dtype=torch.uint8)
            self.reader.into(memory.data_ptr(), job.runs)
            return [digest(_bytes(matrix)) for matrix in _matrices(memory, job.order)]
        memory, state = torch.empty(min(total, PIECE_BYTES), dtype=torch.uint8), hasher()
        for _, runs in run_chunks(job.runs, PIECE_BYTES):
            self.reader.into(memory.data_ptr(), runs)
            state.update(_bytes(memory[: sum(r.nbytes for r in runs)]))
        return [state.hexdigest()]


def _matrices(memory: torch.Tensor, order: _Order) -> Iterator[torch.Tensor]:
    """Yield the bytes of each matrix in canonical order: [n]."""
    stored = memory.view(*order.sizes, order.item)
    transposed = stored.permute(*order.front, *order.own, stored.dim() - 1).contiguous()
    yield from transposed.view(prod(transposed.shape[: len(order.front)]), -1)


def _bytes(memory: torch.Tensor) -> memoryview:
    """The memory of a tensor of bytes, which must live as long."""
    size = memory.numel()
    return memoryview((ctypes.c_ubyte * size).from_address(memory.data_ptr())).cast("B")
