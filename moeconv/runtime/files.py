"""The data files of an output: checked before use, and mapped or read directly into memory."""

from __future__ import annotations

import ctypes
import os
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
from moeconv.store.descriptors import DescriptorPool, Lease, descriptors_left
from moeconv.store.documents import open_regular, unreadable
from moeconv.store.file_io import FileEnded, read_into
from moeconv.store.local import LocalStore

THREADS: Final = 4
_MOST_THREADS: Final = 3 * THREADS  # that read at once, each of them one file
PIECE_BYTES: Final = 4 * 1024 * 1024  # of one read; after a failure the other threads end as soon
_ALIGNMENT: Final = 16  # what kernels may take for granted of a tensor


@dataclass(frozen=True, slots=True)
class DataFile:
    """A file that was checked; `identity` shows later whether it has changed."""

    name: str
    path: Path
    size: int
    identity: tuple[int, int, int, int]  # device, inode, size, mtime_ns

    @property
    def mtime_ns(self) -> int:
        """When it was last changed."""
        return self.identity[-1]


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
        raise _changed(entry.name, "since the virtual output was made")
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
    found = DataFile(name, file.path, file.size, _identity(file.path.stat()))
    most = min(nbytes, LENGTH_BYTES + MAX_HEADER_BYTES, file.size)
    return found, file.read(0, most)


def _identity(facts: os.stat_result) -> tuple[int, int, int, int]:
    return facts.st_dev, facts.st_ino, facts.st_size, facts.st_mtime_ns


def _changed(name: str, when: str) -> SourceChanged:
    return SourceChanged(
        f"{quoted(name)} has changed {when}",
        at=quoted(name),
        cause="its size, time or header differs",
        fix="open the output again, or make it again if it is virtual",
    )


class Reader(ExitStack[bool | None]):
    """Reads runs of the files of a shard, all of them checked before the first byte is read.

    They stay open as far as the limit of open files allows; one that is opened again is checked
    again. bytes_read counts what came out of files, whatever was asked for.
    """

    def __init__(self, files: Mapping[int, DataFile]) -> None:
        super().__init__()
        self._files = files
        self._opened: set[int] = set()
        self._pool = DescriptorPool(self._open_checked, self._refuse_changed, most=1)
        self.callback(self._pool.close)
        self._stopped = False
        self._maps: dict[int, torch.UntypedStorage] = {}
        self.bytes_read = 0

    @property
    def names(self) -> tuple[str, ...]:
        """The files opened."""
        return tuple(self._files[number].name for number in sorted(self._opened))

    def open(self, runs: Iterable[Run]) -> None:
        """Open all files that these are of. Raises IoFailed, SourceChanged, UnsafePath."""
        self._opened |= {r.file for r in runs}
        self._pool.most = max(descriptors_left(len(self._opened)), _MOST_THREADS)
        with closing(Lease(self._pool)) as lease:
            for number in sorted(self._opened):
                self._descriptor(lease, number)

    def _open_checked(self, number: int) -> int:
        """Raises OSError, SourceChanged, UnsafePath."""
        file = self._files[number]
        descriptor = open_regular(file.path, name=file.name)
        try:
            self._refuse_changed(number, descriptor, "since it was opened")
        except BaseException:
            os.close(descriptor)
            raise
        return descriptor

    def _refuse_changed(
        self, number: int, descriptor: int, when: str = "while it was read"
    ) -> None:
        file = self._files[number]
        if _identity(os.fstat(descriptor)) != file.identity:
            raise _changed(file.name, when)

    def _descriptor(self, lease: Lease, number: int) -> int:
        """The descriptor of a file, until the lease is on another. Raises IoFailed and the like."""
        try:
            return lease.on(number)
        except OSError as problem:
            file = self._files[number]
            raise unreadable(file.path, problem, name=file.name) from None

    def check(self) -> None:
        """Whether all files are still what they were. Raises SourceChanged, IoFailed."""
        still_open = self._pool.open
        for number in sorted(self._opened):
            file, descriptor = self._files[number], still_open.get(number)
            try:
                facts = os.fstat(descriptor) if descriptor is not None else file.path.stat()
            except OSError as problem:
                raise unreadable(file.path, problem, name=file.name) from None
            if _identity(facts) != file.identity:
                raise _changed(file.name, "while it was read")

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
            # where one failed the others just ended: what failed is what is told
            for problem in filter(None, [part.exception() for part in parts]):
                raise problem
        self.bytes_read += total

    def _read(self, address: int, runs: tuple[Run, ...]) -> None:
        size = sum(r.nbytes for r in runs)
        memory = memoryview((ctypes.c_ubyte * size).from_address(address)).cast("B")
        at, lease = 0, Lease(self._pool)
        try:
            for run in runs:
                descriptor = self._descriptor(lease, run.file)
                for done in range(0, run.nbytes, PIECE_BYTES):
                    if self._stopped:
                        return
                    size = min(run.nbytes - done, PIECE_BYTES)
                    self._read_piece(descriptor, memory[at : at + size], run, run.offset + done)
                    at += size
        except BaseException:
            self._stopped = True
            raise
        finally:
            lease.close()

    def _read_piece(self, descriptor: int, piece: memoryview, run: Run, offset: int) -> None:
        file = self._files[run.file]
        try:
            read_into(descriptor, piece, offset)
        except FileEnded:
            cause = f"it ends before byte {run.offset + run.nbytes:,}"
            raise damaged(file.name, cause) from None
        except OSError as problem:
            raise unreadable(file.path, problem, name=file.name) from None

    def _mapped(self, file: DataFile, number: int) -> torch.UntypedStorage:
        with closing(Lease(self._pool)) as lease:
            place = f"/proc/self/fd/{self._descriptor(lease, number)}"
            try:
                found = torch.UntypedStorage.from_file(place, shared=False, nbytes=file.size)
            except RuntimeError as problem:
                raise IoFailed(
                    f"cannot map {quoted(file.name)} into memory",
                    at=quoted(str(file.path)),
                    cause=printable(str(problem).partition("\n")[0]),
                    fix="check that it is whole, and the limits of open files and of address space",
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
            # by descriptor, so that what is mapped is what was looked at
            self._maps[run.file] = self._mapped(self._files[run.file], run.file)
        start, shape = run.offset // dtype.itemsize, tensor.torch_shape
        strides = tuple(prod(shape[dim + 1 :]) for dim in range(len(shape)))
        return torch.empty(0, dtype=dtype).set_(self._maps[run.file], start, shape, strides)
