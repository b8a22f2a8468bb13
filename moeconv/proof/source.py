"""Level `source`: every byte of the source's tensors, found again through the inverse plan."""

from __future__ import annotations

import os
import threading
from bisect import bisect_right
from collections.abc import Callable
from typing import Final

import numpy as np

from moeconv.checkpoint.file_io import read_bytes
from moeconv.checkpoint.reading import file_digest, unreadable
from moeconv.checkpoint.sidecars import Sidecar
from moeconv.checkpoint.source import Checkpoint, DataFile
from moeconv.digest import digest
from moeconv.engine.crew import Limits, Progress, Reader, run_tiles
from moeconv.engine.gather import BUFFER_BYTES
from moeconv.engine.tiles import Digests, Origin
from moeconv.errors import Damaged, MoeconvError, TensorNotInFile, quoted
from moeconv.layout.detect import Detection
from moeconv.plan.existing import plan_onto, plan_onto_set
from moeconv.plan.values import OutputFile, OutputTensor
from moeconv.proof.digests import placed_headers

_MAX_REPORTED: Final = 1000


def compare_source(
    output: tuple[Checkpoint, Detection],
    source: tuple[Checkpoint, Detection],
    *,
    limits: Limits,
    progress: Progress,
) -> list[MoeconvError]:
    """Hold all tensors of `source` against `output`, byte by byte, whatever their layouts."""
    problems = _different_sets(output[1], source[1])
    problems += _different_sidecars(output[0], source[0])
    if any(isinstance(p, TensorNotInFile) for p in problems):
        return problems
    # of a set for ranks every replica must be what the source makes it, so it is held against the
    # source; of any other output each of the source's own bytes must be found again
    sharded = output[0].manifest is not None and output[0].manifest.root.ep_size is not None
    (read, detection), (held, target) = (source, output) if sharded else (output, source)
    files = planned_onto(detection, target, held)
    by_name = {f.name: f for f in held.files}
    lock = threading.Lock()

    def report(problem: MoeconvError) -> None:
        with lock:
            if len(problems) < _MAX_REPORTED:
                problems.append(problem)

    run_tiles(
        files,
        read.files,
        lambda file: _Comparing(file, by_name[file.name], report),
        limits=limits,
        progress=progress,
    )
    return problems


def planned_onto(
    detection: Detection, target: Detection, held: Checkpoint
) -> tuple[OutputFile, ...]:
    """The data files of `held`, which are `target`'s, as if filled from `detection`."""
    manifest, headers = held.manifest, placed_headers(held)
    if manifest is not None and manifest.root.ep_size is not None:
        return plan_onto_set(detection, target, manifest, headers)
    return plan_onto(detection, target, headers)


def _different_sets(output: Detection, source: Detection) -> list[MoeconvError]:
    """Tensors and stacks that only one side has, or that differ in dtype or size."""
    problems: list[MoeconvError] = []
    ours = _facts(output)
    theirs = _facts(source)
    for name in sorted(ours.keys() | theirs.keys()):
        mine, wanted = ours.get(name), theirs.get(name)
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


def _original(checkpoint: Checkpoint, sidecar: Sidecar) -> str:
    """The digest of a sidecar as it was in the first source."""
    own = checkpoint.origin
    kept = dict(own.origin.sidecars).get(sidecar.name) if own else None
    return digest(kept) if kept is not None else file_digest(sidecar.path, name=sidecar.name)


def _different_sidecars(output: Checkpoint, source: Checkpoint) -> list[MoeconvError]:
    ours = {s.name: s for s in output.sidecars}
    problems: list[MoeconvError] = []
    for sidecar in source.sidecars:
        mine = ours.get(sidecar.name)
        same = mine is not None and _original(output, mine) == _original(source, sidecar)
        if not same:
            problems.append(
                Damaged(
                    f"{quoted(sidecar.name)} is not the same in OUT and SRC",
                    at=quoted(sidecar.name),
                    cause="it is absent from OUT" if mine is None else "its bytes differ",
                    fix="convert again from this source",
                )
            )
    return problems


class _Comparing(Reader):
    """A target that holds what would be written against what is there."""

    def __init__(
        self, file: OutputFile, actual: DataFile, report: Callable[[MoeconvError], None]
    ) -> None:
        self._file = file
        self._actual = actual
        self._report = report
        self._descriptor = -1
        self._starts = [t.offset for t in file.tensors]
        self._reported: set[str] = set()

    def open(self) -> None:
        """Open the source's file."""
        try:
            self._descriptor = os.open(self._actual.path, os.O_RDONLY | os.O_CLOEXEC)
        except OSError as problem:
            raise unreadable(self._actual.path, problem, name=self._actual.name) from None

    def write(self, view: memoryview, offset: int, origin: Origin | None = None) -> None:
        """Compare; the first difference of each tensor is reported."""
        for at in range(0, len(view), BUFFER_BYTES):
            ours = view[at : at + BUFFER_BYTES]
            theirs = self._actual_bytes(offset + at, len(ours))
            if theirs != ours.tobytes():
                self._differs(ours, theirs, offset + at)

    def _actual_bytes(self, offset: int, nbytes: int) -> bytes:
        """What is there: all of it, or an error, for what cannot be read is not proven."""
        try:
            return read_bytes(self._descriptor, nbytes, offset)
        except OSError as problem:
            raise unreadable(self._actual.path, problem, name=self._actual.name) from None

    def _differs(self, ours: memoryview, theirs: bytes, offset: int) -> None:
        count = len(ours)
        different = np.frombuffer(ours, np.uint8) != np.frombuffer(theirs, np.uint8)
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
                self._tell(tensor, offset + start + int(inside.argmax()))

    def _tell(self, tensor: OutputTensor, at: int) -> None:
        self._report(
            Damaged(
                f"{quoted(tensor.name)} has other bytes in OUT than in SRC",
                at=f"{quoted(self._file.name)}, tensor {quoted(tensor.name)}",
                cause=f"the first difference is at byte {at - tensor.offset:,} of the tensor",
                fix="convert again from this source",
            )
        )

    def finish(self, digests: Digests) -> None:
        """Nothing to keep."""

    def close(self) -> None:
        """Close the source's file."""
        if self._descriptor >= 0:
            os.close(self._descriptor)
            self._descriptor = -1
