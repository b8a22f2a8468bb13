"""The data files of an output: checked before use, and mapped or read directly into memory."""

from __future__ import annotations

import ctypes
from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor, wait
from contextlib import ExitStack, closing
from dataclasses import dataclass
from functools import cached_property
from math import prod
from pathlib import Path
from typing import Final, cast

import torch

from moeconv.checkpoint.header import LENGTH_BYTES, MAX_HEADER_BYTES
from moeconv.checkpoint.output_files import check_data_file, damaged, missing
from moeconv.core.digest import digest
from moeconv.errors import IoFailed, SourceChanged, printable, quoted
from moeconv.manifest.model import Part, Run, SourceFile
from moeconv.runtime.byte_runs import LocalTensor, run_chunks
from moeconv.store.descriptors import descriptors_left
from moeconv.store.file_io import FileEnded, read_into
from moeconv.store.local import LocalStore
from moeconv.store.open_files import OpenFile, OpenFiles

THREADS: Final = 4
_MOST_THREADS: Final = 3 * THREADS  # that read at once, each of them one file
PIECE_BYTES: Final = 4 * 1024 * 1024  # of one read; after a failure the other threads end as soon
_ALIGNMENT: Final = 16  # what kernels may take for granted of a tensor


@dataclass(frozen=True, slots=True)
class DataFile:
    """A file that was checked; `identity` shows later whether it has changed."""

    name: str
    path: Path
    identity: tuple[int, int, int, int]  # device, inode, size, mtime_ns

    @property
    def size(self) -> int:
        """Bytes, with the header."""
        return self.identity[2]

    @property
    def mtime_ns(self) -> int:
        """When it was last changed."""
        return self.identity[3]


def open_data_file(store: LocalStore, part: Part) -> DataFile:
    """Check a data file of an output against its part.

    Raises MissingShard, Damaged, BadHeader, UnsafePath, IoFailed, SourceMissing, SourceChanged.
    """
    found, header = _header(store, part.file, part.header_size)
    check_data_file(part, found.size, header)
    return found


def open_source_file(store: LocalStore, entry: SourceFile, *, copied: bool) -> DataFile:
    """Check a file that a virtual output refers to.

    copied: the caller says that it is here, so that its time may be another.
    Raises MissingShard, SourceChanged, UnsafePath, IoFailed, SourceMissing.
    """
    found, header = _header(store, entry.name, entry.header_size)
    if (found.size, digest(header)) != (entry.size, entry.header_digest):
        raise SourceChanged(
            f"{quoted(entry.name)} has changed since the virtual output was made",
            at=quoted(store.address),
            cause="its size or header differs",
            fix="create it again",
        )
    if found.mtime_ns != entry.mtime_ns and not copied:
        raise SourceChanged(
            f"{quoted(entry.name)} was modified since the virtual output was made",
            at=quoted(store.address),
            cause="it was written to, or copied; its size and header are the same",
            fix="create it again; if the file is a copy, pass its directory as `source=`",
        )
    return found


def _header(store: LocalStore, name: str, nbytes: int) -> tuple[DataFile, bytes]:
    """A file, and as many of its first bytes as its header has by the manifest."""
    file = store.file(name)
    if file is None:
        raise missing(name)
    facts = file.path.stat()
    identity = facts.st_dev, facts.st_ino, facts.st_size, facts.st_mtime_ns
    most = min(nbytes, LENGTH_BYTES + MAX_HEADER_BYTES, file.size)
    return DataFile(name, file.path, identity), file.read(0, most)


class Reader(ExitStack[bool | None]):
    """Reads runs of the files of a shard, all of them checked before the first byte is read.

    They stay open as far as the limit of open files allows; one that is opened again is checked
    again. bytes_read counts what came out of files, whatever was asked for.
    """

    def __init__(self, files: Mapping[int, DataFile]) -> None:
        super().__init__()
        self._files = files
        inodes = {number: file.identity[:2] for number, file in files.items()}
        self._open_files = OpenFiles(files, most=1, inodes=inodes)
        self.callback(self._open_files.close)
        self._stopped = False
        self._maps: dict[int, torch.UntypedStorage] = {}
        self.bytes_read = 0

    @property
    def names(self) -> tuple[str, ...]:
        """The files opened."""
        return tuple(self._files[number].name for number in self._open_files.numbers)

    def open(self, runs: Iterable[Run]) -> None:
        """Open all files that these are of. Raises IoFailed, SourceChanged, UnsafePath."""
        numbers = {r.file for r in runs}.union(self._open_files.numbers)
        self._open_files.pool.most = max(descriptors_left(len(numbers)), _MOST_THREADS)
        self._open_files.open_all(numbers)

    def check(self) -> None:
        """Whether all files are still what they were. Raises SourceChanged, IoFailed."""
        self._open_files.unchanged()

    @cached_property
    def _threads(self) -> ThreadPoolExecutor:
        pool = ThreadPoolExecutor(THREADS)
        # made after the reader, so that it ends before the descriptors are closed
        self.callback(pool.shutdown, wait=True, cancel_futures=True)
        return pool

    def into(self, address: int, runs: tuple[Run, ...]) -> None:
        """Fill memory from `address` on. Raises IoFailed, Damaged.

        The caller holds the memory: it must be that large and stay alive. Whatever is raised, no
        thread writes into it any more then.
        """
        total = sum(r.nbytes for r in runs)
        share = max(-(-total // THREADS), PIECE_BYTES)
        if total <= share:
            self._read(address, runs)
        else:
            # one thread is as fast as one core copies; the page cache and most disks are faster
            shares = run_chunks(runs, share)
            parts = [self._threads.submit(self._read, address + at, part) for at, part in shares]
            try:
                wait(parts)
            except BaseException:
                self._stopped = True
                wait(parts)
                raise
            # if one thread failed, the others merely stopped: report the failure
            for problem in filter(None, [part.exception() for part in parts]):
                raise problem
        self.bytes_read += total

    def _read(self, address: int, runs: tuple[Run, ...]) -> None:
        size = sum(r.nbytes for r in runs)
        memory = memoryview((ctypes.c_ubyte * size).from_address(address)).cast("B")
        at = 0
        try:
            with closing(self._open_files.reader()) as reader:
                for run in runs:
                    for done in range(0, run.nbytes, PIECE_BYTES):
                        if self._stopped:
                            return
                        piece = memory[at : at + min(run.nbytes - done, PIECE_BYTES)]
                        self._read_piece(reader.file(run.file), piece, run, run.offset + done)
                        at += len(piece)
        except BaseException:
            self._stopped = True
            raise

    def _read_piece(self, file: OpenFile, piece: memoryview, run: Run, offset: int) -> None:
        try:
            read_into(file.descriptor, piece, offset)
        except FileEnded:
            cause = f"it ends before byte {run.offset + run.nbytes:,}"
            raise damaged(self._files[file.number].name, cause) from None
        except OSError as problem:
            raise self._open_files.failed(file.number, problem, offset) from None

    def _mapped(self, number: int) -> torch.UntypedStorage:
        file = self._files[number]
        with closing(self._open_files.reader()) as reader:
            # by descriptor, so that what is mapped is what was looked at
            place = f"/proc/self/fd/{reader.file(number).descriptor}"
            try:
                found = torch.UntypedStorage.from_file(place, shared=False, nbytes=file.size)
            except RuntimeError as problem:
                raise IoFailed(
                    f"cannot map {quoted(file.name)} into memory",
                    at=quoted(str(file.path)),
                    cause=printable(str(problem).partition("\n")[0]),
                    fix="check that it is complete, and the limits on open files and address space",
                ) from None
        return cast("torch.UntypedStorage", found)

    def view(self, tensor: LocalTensor) -> torch.Tensor | None:
        """The tensor without a copy, or None where it is not one aligned run.

        Files are mapped privately: writing to a view never reaches them.
        """
        if len(tensor.runs) != 1 or tensor.runs[0].offset % _ALIGNMENT:
            return None
        run, dtype = tensor.runs[0], tensor.torch_dtype
        if run.file not in self._maps:
            self._maps[run.file] = self._mapped(run.file)
        start, shape = run.offset // dtype.itemsize, tensor.torch_shape
        strides = tuple(prod(shape[dim + 1 :]) for dim in range(len(shape)))
        return torch.empty(0, dtype=dtype).set_(self._maps[run.file], start, shape, strides)
