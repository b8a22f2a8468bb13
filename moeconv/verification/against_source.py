"""Level `source`: compare every byte of the source's tensors, through the inverse plan."""

from __future__ import annotations

import os
import threading
from bisect import bisect_right
from collections.abc import Callable

import numpy as np

from moeconv.checkpoint.model import Checkpoint, DataFile
from moeconv.detect.detect import Detection
from moeconv.engine.copy.buffers import BUFFER_BYTES
from moeconv.engine.copy.pool import Limits, Progress, run_tiles
from moeconv.engine.copy.sink import Digests, Sink, SourcePosition
from moeconv.engine.manifest_writer import entry_of
from moeconv.engine.recorded_digests import Recorded, recorded
from moeconv.errors import Damaged, MoeconvError, TensorNotInFile, quoted
from moeconv.manifest.model import StackEntry, addresses
from moeconv.plan.convert import entries_as_stored
from moeconv.plan.model import OutputFile, OutputTensor
from moeconv.plan.onto_existing import plan_onto, plan_onto_ranks
from moeconv.store.documents import unreadable
from moeconv.store.file_io import read_bytes
from moeconv.verification.digests import placed_headers
from moeconv.verification.report import MAX_REPORTED


def compare_source(
    output: tuple[Checkpoint, Detection],
    source: tuple[Checkpoint, Detection],
    *,
    limits: Limits,
    progress: Progress,
) -> list[MoeconvError]:
    """Compare all tensors of `source` with `output` byte by byte, whatever their layouts.

    The digests that `output` records are compared, too. Both must have the same tensors.
    """
    problems: list[MoeconvError] = []
    # in an output for ranks every replica must match, so its files are checked one by one; of any
    # other output each byte of the source's own files must be found again
    sharded = output[0].manifest is not None and output[0].manifest.root.ep_size is not None
    (read, detection), (held, target) = (source, output) if sharded else (output, source)
    files = plan_held_files(detection, target, held)
    by_name = {f.name: f for f in held.files}
    record, stacks = recorded(output[0]), entries_as_stored(source[1].stacks)
    lock = threading.Lock()

    def report(problem: MoeconvError) -> None:
        with lock:
            if len(problems) < MAX_REPORTED:
                problems.append(problem)

    run_tiles(
        files,
        read.files,
        lambda file: CompareSink(file, by_name[file.name], report, record, stacks),
        limits=limits,
        progress=progress,
    )
    return problems


def plan_held_files(
    detection: Detection, target: Detection, held: Checkpoint
) -> tuple[OutputFile, ...]:
    """Plan the data files of `held`, which are `target`'s, as if written from `detection`."""
    manifest, headers = held.manifest, placed_headers(held)
    if manifest is not None and manifest.root.ep_size is not None:
        return plan_onto_ranks(detection, target, manifest, headers)
    return plan_onto(detection, target, headers)


def tensor_differences(output: Detection, source: Detection) -> list[MoeconvError]:
    """Report tensors and stacks that only one side has, or that differ in dtype or size."""
    problems: list[MoeconvError] = []
    in_output = _facts(output)
    in_source = _facts(source)
    for name in sorted(in_output.keys() | in_source.keys()):
        mine, wanted = in_output.get(name), in_source.get(name)
        if mine == wanted:
            continue
        problems.append(
            TensorNotInFile(
                f"{quoted(name)} is not the same in OUT and SRC",
                at=quoted(name),
                cause=f"OUT: {mine or 'absent'}; SRC: {wanted or 'absent'}",
                fix="convert again from this source",
            )
        )
    return problems


def _facts(detection: Detection) -> dict[str, str]:
    facts = {t.name: f"{t.dtype} {list(t.shape)}" for t in detection.others}
    for stack in detection.stacks:
        held = ", ".join(
            sorted(
                f"{p}.{m.component.name} {m.dtype} {list(m.geometry.canonical_shape)}"
                for m in stack.members
                for p in m.line.projections
            )
        )
        facts[stack.name] = f"{stack.sizes.experts} experts of {held}"
    return facts


class CompareSink(Sink):
    """A sink that compares what would be written with what is there."""

    def __init__(
        self,
        file: OutputFile,
        actual: DataFile,
        report: Callable[[MoeconvError], None],
        record: Recorded,
        stacks: tuple[StackEntry, ...],
    ) -> None:
        self._file = file
        self._actual = actual
        self._report = report
        self._record = record
        self._stacks = stacks
        self._descriptor = -1
        self._starts = [t.offset for t in file.tensors]
        self._reported: set[str] = set()

    def open(self) -> None:
        """Open the source's file."""
        try:
            self._descriptor = os.open(self._actual.path, os.O_RDONLY | os.O_CLOEXEC)
        except OSError as problem:
            raise unreadable(self._actual.path, problem, name=self._actual.name) from None

    def write(self, view: memoryview, offset: int, origin: SourcePosition | None = None) -> None:
        """Compare; the first difference of each tensor is reported."""
        for at in range(0, len(view), BUFFER_BYTES):
            expected = view[at : at + BUFFER_BYTES]
            actual = self._actual_bytes(offset + at, len(expected))
            if actual != expected.tobytes():
                self._differs(expected, actual, offset + at)

    def _actual_bytes(self, offset: int, nbytes: int) -> bytes:
        """Read all of these bytes; whatever cannot be read is an error."""
        try:
            return read_bytes(self._descriptor, nbytes, offset)
        except OSError as problem:
            raise unreadable(self._actual.path, problem, name=self._actual.name) from None

    def _differs(self, expected: memoryview, actual: bytes, offset: int) -> None:
        count = len(expected)
        different = np.frombuffer(expected, np.uint8) != np.frombuffer(actual, np.uint8)
        first = max(bisect_right(self._starts, offset) - 1, 0)
        for tensor in self._file.tensors[first:]:
            if tensor.offset >= offset + count:
                return
            if tensor.name in self._reported:
                continue
            start = max(tensor.offset - offset, 0)
            inside = different[start : tensor.offset + tensor.nbytes - offset]
            if inside.any():
                self._reported.add(tensor.name)
                self._report_difference(tensor, offset + start + int(inside.argmax()))

    def _report_difference(self, tensor: OutputTensor, at: int) -> None:
        self._report(
            Damaged(
                f"{quoted(tensor.name)} does not have the same bytes in OUT and SRC",
                at=f"{quoted(self._file.name)}, tensor {quoted(tensor.name)}",
                cause=f"the first difference is at byte {at - tensor.offset:,} of the tensor",
                fix="convert again from this source",
            )
        )

    def finish(self, digests: Digests) -> None:
        """Compare the digests that OUT records with those of the bytes, if these are SRC's."""
        for tensor, row in zip(self._file.tensors, digests, strict=True):
            if tensor.name in self._reported:
                continue
            for address, value in zip(addresses(entry_of(tensor), self._stacks), row, strict=True):
                if self._record.contradicts(address, value):
                    wanted = self._record.matrices.get(address)
                    self._report(
                        Damaged(
                            f"OUT records a wrong digest of {quoted(address)}",
                            at=f"{quoted(self._file.name)}, tensor {quoted(tensor.name)}",
                            cause=f"its bytes are SRC's, their digest is {value}; "
                            f"OUT's manifest has {wanted or 'none'}",
                            fix="convert again from this source",
                        )
                    )

    def close(self) -> None:
        """Close the source's file."""
        if self._descriptor >= 0:
            os.close(self._descriptor)
            self._descriptor = -1
