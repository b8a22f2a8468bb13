"""`open(..., verify="digest")`: every byte that this rank will use, compared with the manifest."""

from __future__ import annotations

import ctypes
from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Final

import torch

from moeconv.core.digest import digest, hasher
from moeconv.core.dtypes import BITS
from moeconv.core.text import counted, listed
from moeconv.errors import Damaged, DigestsMissing, quoted
from moeconv.layout.axes import EXPERT, PAIR, canonical_order
from moeconv.manifest.model import Run, StackEntry, addresses
from moeconv.runtime.byte_runs import LocalTensor, equal_part, run_chunks
from moeconv.runtime.files import PIECE_BYTES, THREADS, DataFile, Reader
from moeconv.runtime.validate import is_stacked, sizes_of

_SHOWN: Final = 20


def check_digests(
    tensors: Iterable[LocalTensor], stacks: tuple[StackEntry, ...], files: Mapping[int, DataFile]
) -> None:
    """Read all bytes of some tensors and compare them with their digests (FORMAT.md, section 1).

    Raises DigestsMissing where they were never computed, Damaged naming what differs, IoFailed,
    SourceChanged, BadManifest.
    """
    chosen = tuple(tensors)
    if unread := [t.name for t in chosen if not t.entry.digests]:
        have = "has" if len(unread) == 1 else "have"
        raise DigestsMissing(
            f"{counted(len(unread), 'tensor')} of this rank {have} no digest",
            at=quoted(unread[0]),
            cause="the output is virtual, or was written with `--digests later`",
            fix="`moeconv verify --level source --source SRC --fill` adds them",
        )
    jobs = [(tensor, n) for tensor in chosen for n in range(_stacked_experts(tensor))]
    wrong: list[str] = []
    with Reader(files) as reader:
        reader.open(run for tensor in chosen for run in tensor.runs)
        pool = ThreadPoolExecutor(THREADS)
        try:
            found = pool.map(lambda job: _digests(reader, *job), jobs)
            for tensor in chosen:
                fresh = [value for _ in range(_stacked_experts(tensor)) for value in next(found)]
                named = zip(
                    addresses(tensor.entry, stacks), fresh, tensor.entry.digests, strict=True
                )
                wrong += [
                    f"{quoted(address)} in {quoted(tensor.name)}"
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


def _stacked_experts(tensor: LocalTensor) -> int:
    """How many equal parts it has that are read one by one: its experts, if they are stacked."""
    expert = tensor.entry.expert
    return len(expert.experts) if expert is not None and is_stacked(expert) else 1


def _digests(reader: Reader, tensor: LocalTensor, number: int) -> list[str]:
    """The digests of the matrices in one of a tensor's parts, as the manifest orders them.

    Several threads do so at once. Raises IoFailed, SourceChanged, BadManifest.
    """
    expert, parts = tensor.entry.expert, _stacked_experts(tensor)
    if expert is None:
        return [_digest(reader, tensor.runs)]
    runs = equal_part(tensor.runs, number, parts)
    sizes, bits = sizes_of(tensor.entry, expert), BITS[tensor.dtype]
    sizes.pop(EXPERT, None)
    letters = list(sizes)
    if bits % 8 and letters:  # several values in a byte: the fastest axis is counted in bytes
        sizes[letters[-1]] = sizes[letters[-1]] * bits // 8
    order = (*((PAIR,) if PAIR in sizes else ()), *canonical_order(letters))
    count = sizes.get(PAIR, 1)
    if tuple(letters) == order:
        each = [_digest(reader, equal_part(runs, n, count)) for n in range(count)]
    else:
        memory = torch.empty(sum(r.nbytes for r in runs), dtype=torch.uint8)
        reader.into(memory.data_ptr(), runs)
        stored = memory.view(*sizes.values(), max(bits // 8, 1))
        canonical = stored.permute(*map(letters.index, order), stored.dim() - 1).contiguous()
        each = [digest(_bytes(matrix)) for matrix in canonical.view(count, -1)]
    # where the projections, or experts, have no axis, they share one matrix
    return each * (expert.units // parts // count)


def _digest(reader: Reader, runs: tuple[Run, ...]) -> str:
    """The digest of some bytes, read through a small buffer."""
    state, size = hasher(), min(sum(r.nbytes for r in runs), PIECE_BYTES)
    buffer = torch.empty(size, dtype=torch.uint8)
    for _, portion in run_chunks(runs, PIECE_BYTES):
        reader.into(buffer.data_ptr(), portion)
        state.update(_bytes(buffer[: sum(r.nbytes for r in portion)]))
    return state.hexdigest()


def _bytes(memory: torch.Tensor) -> memoryview:
    """The memory of a tensor of bytes, which must live as long."""
    size = memory.numel()
    return memoryview((ctypes.c_ubyte * size).from_address(memory.data_ptr())).cast("B")
