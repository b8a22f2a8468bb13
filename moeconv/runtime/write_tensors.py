"""Bytes of files into memory: directly where the order is the same, else through a buffer."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Final

import torch

from moeconv.errors import UsageProblem
from moeconv.manifest.model import Run
from moeconv.runtime.byte_runs import LocalTensor, run_chunks, slice_runs
from moeconv.runtime.dtensor import BLOCK_BYTES, Block, Selection, blocks, copies
from moeconv.runtime.files import DataFile, Reader

RING_BUFFERS: Final = 3
RING_BYTES: Final = 32 * 1024 * 1024


@dataclass(frozen=True, slots=True)
class Step:
    """Rows of one destination and the part of a local tensor that belongs there.

    wanted, read: selections of the local tensor; they differ where whole rows are read around
    small pieces. direct: the bytes are in the same order in both.
    """

    wanted: Selection
    read: Selection
    rows: tuple[int, int]
    direct: bool

    def blocks(self, tensor: LocalTensor) -> Iterator[tuple[Block, tuple[Run, ...]]]:
        """What to read, where it is now."""
        item, limit = tensor.torch_dtype.itemsize, None if self.direct else BLOCK_BYTES
        sizes = tensor.torch_shape
        found = blocks(sizes, item, self.wanted, self.read, rows=self.rows, limit=limit)
        return ((block, slice_runs(tensor.runs, block.pieces)) for block in found)


class PinnedRing:
    """Pinned buffers between files and one GPU: one is read into while others are copied."""

    def __init__(self, device: torch.device) -> None:
        self._buffers = [
            torch.empty(RING_BYTES, dtype=torch.uint8, pin_memory=True) for _ in range(RING_BUFFERS)
        ]
        self._copied: list[torch.cuda.Event | None] = [None] * RING_BUFFERS
        self._stream = torch.cuda.Stream(device)
        self._device = device
        self._turn = 0

    def copy(self, into: torch.Tensor, runs: tuple[Run, ...], reader: Reader) -> None:
        """Fill a flat uint8 tensor of the GPU; returns before the last copies are done."""
        self._stream.wait_stream(torch.cuda.current_stream(self._device))
        for start, portion in run_chunks(runs, RING_BYTES):
            size = sum(r.nbytes for r in portion)
            buffer, copied = self._buffers[self._turn], self._copied[self._turn]
            if copied is not None:
                copied.synchronize()
            reader.into(buffer.data_ptr(), portion)
            with torch.cuda.stream(self._stream):
                into[start : start + size].copy_(buffer[:size], non_blocking=True)
                event = torch.cuda.Event()
                event.record(self._stream)
            self._copied[self._turn] = event
            self._turn = (self._turn + 1) % RING_BUFFERS

    def finish(self) -> None:
        """Wait until everything has arrived."""
        self._stream.synchronize()


class TensorWriter(ExitStack[bool | None]):
    """Fills tensors; when it is left, every byte has arrived.

    It keeps its buffers, so that the next use of it allocates nothing.
    """

    def __init__(self) -> None:
        super().__init__()
        self._rings: dict[torch.device, PinnedRing] = {}
        self._staging = torch.empty(0, dtype=torch.uint8)

    def __enter__(self) -> TensorWriter:
        self.callback(self._finish)
        return self

    def _finish(self) -> None:
        for ring in self._rings.values():
            ring.finish()

    def _staged(self, runs: tuple[Run, ...], reader: Reader) -> torch.Tensor:
        size = sum(r.nbytes for r in runs)
        if self._staging.numel() < size:
            self._staging = torch.empty(size, dtype=torch.uint8)
        reader.into(self._staging.data_ptr(), runs)
        return self._staging[:size]

    def contiguous(
        self, into: torch.Tensor, start: int, runs: tuple[Run, ...], reader: Reader
    ) -> None:
        """Fill the bytes of a contiguous tensor from byte `start` on."""
        if not runs:
            return
        if into.device.type == "cpu":
            reader.into(into.data_ptr() + start, runs)
            return
        flat = into.view(-1).view(torch.uint8)[start:]
        if into.device.type == "cuda":
            if into.device not in self._rings:
                self._rings[into.device] = PinnedRing(into.device)
            self._rings[into.device].copy(flat, runs, reader)
        else:
            self.buffered(flat, runs, reader)

    def buffered(self, flat: torch.Tensor, runs: tuple[Run, ...], reader: Reader) -> None:
        """Fill flat bytes of any device through a buffer."""
        for before, portion in run_chunks(runs, BLOCK_BYTES):
            data = self._staged(portion, reader)
            flat[before : before + data.numel()].copy_(data)

    def step(self, into: torch.Tensor, step: Step, source: LocalTensor, reader: Reader) -> None:
        """Fill the rows of one destination, converting where it has another dtype."""
        target = into if into.dim() else into.view(1)
        row_bytes = target[0].numel() * target.dtype.itemsize if target.shape[0] else 0
        for block, runs in step.blocks(source):
            if step.direct:
                self.contiguous(target, block.rows[0] * row_bytes, runs, reader)
                continue
            data = self._staged(runs, reader).view(source.torch_dtype).view(block.shape)
            place = target[slice(*block.rows)]
            if block.columns is not None:
                place = place[:, slice(*block.columns)]
            for to, taken in copies(step.wanted, step.read):
                _within(place, to).copy_(_within(data, taken))


def _within(tensor: torch.Tensor, spans: tuple[tuple[int, int], ...]) -> torch.Tensor:
    for dim, (start, stop) in enumerate(spans, start=1):
        if stop >= 0:
            tensor = tensor.narrow(dim, start, stop - start)
    return tensor


def checked_device(device: torch.device | str | None) -> torch.device | None:
    """The device that a caller named. Raises UsageProblem for meta, which holds no bytes."""
    found = None if device is None else torch.device(device)
    if found is not None and found.type == "meta":
        raise UsageProblem("nothing can be loaded onto meta", fix="name a device with memory")
    return found


def load_tensors(
    tensors: Iterable[LocalTensor],
    files: Mapping[int, DataFile],
    device: torch.device | str | None,
    *,
    copy: bool = False,
) -> dict[str, torch.Tensor]:
    """Tensors by name: views of mapped files where that can be, else read; copy: always read.

    Raises NoTorchDtype, UsageProblem, IoFailed, SourceChanged.
    """
    tensors, where = tuple(tensors), checked_device(device) or torch.device("cpu")
    out: dict[str, torch.Tensor] = {}
    with torch.no_grad(), Reader(files) as reader, TensorWriter() as writer:
        reader.open(run for t in tensors for run in t.runs)
        for tensor in tensors:
            view = reader.view(tensor) if where.type == "cpu" and not copy else None
            if view is None:
                view = torch.empty(tensor.torch_shape, dtype=tensor.torch_dtype, device=where)
                writer.contiguous(view, 0, tensor.runs, reader)
            out[tensor.name] = view
        reader.check()
    return out
