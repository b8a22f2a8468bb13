"""The data files of a set: known again before use, mapped or read straight into memory."""

from __future__ import annotations

import ctypes
import os
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor, wait
from contextlib import ExitStack
from dataclasses import dataclass
from functools import cached_property
from math import prod
from pathlib import Path
from types import TracebackType
from typing import Final, cast

import torch

from moeconv.checkpoint.papers import damaged, inside
from moeconv.checkpoint.reading import opened, read_start, unreadable
from moeconv.digest import digest
from moeconv.errors import MissingShard, SourceChanged, quoted
from moeconv.manifest import ROOT_NAME, Part, Run, SourceFile
from moeconv.runtime.tensors import LocalTensor

_MAX_HEADER: Final = 8 + 100_000_000
_THREADS: Final = 4
_PIECE_BYTES: Final = 4 * 1024 * 1024


@dataclass(frozen=True, slots=True)
class DataFile:
    """A file that was found to be the right one; `identity` tells whether it still is."""

    name: str
    path: Path
    size: int
    identity: tuple[int, int, int, int]  # device, inode, size, mtime_ns


def own_file(home: Path, part: Part) -> DataFile:
    """A data file of the set. Raises MissingShard, Damaged, UnsafePath, IoFailed."""
    path = _existing(home, part.file, ROOT_NAME)
    with opened(path, name=part.file) as (descriptor, facts):
        if facts.st_size != part.size:
            cause = f"it has {facts.st_size:,} bytes, its part says {part.size:,}"
            raise damaged(part.file, cause)
        if _header_digest(descriptor, path, part.file, part.header_size) != part.header_digest:
            raise damaged(part.file, "its header is not the one that was written")
    return DataFile(part.file, path, facts.st_size, _identity(facts))


def source_file(home: Path, entry: SourceFile) -> DataFile:
    """A file that a virtual set points into. Raises MissingShard, SourceChanged, UnsafePath."""
    path = _existing(home, entry.name, str(home))
    with opened(path, name=entry.name) as (descriptor, facts):
        found = _header_digest(descriptor, path, entry.name, entry.header_size)
        pinned = (entry.size, entry.mtime_ns, entry.header_digest)
        if (facts.st_size, facts.st_mtime_ns, found) != pinned:
            raise _changed(entry.name, "since the virtual set was made")
    return DataFile(entry.name, path, facts.st_size, _identity(facts))


def _existing(home: Path, name: str, named_in: str) -> Path:
    path = inside(home, name)
    if not path.exists():
        raise MissingShard(
            f"{quoted(name)} is not there",
            at=quoted(named_in),
            cause="this rank needs it",
            fix="fetch that file of the set",
        )
    return path


def _header_digest(descriptor: int, path: Path, name: str, size: int) -> str:
    try:
        return digest(read_start(descriptor, min(size, _MAX_HEADER)))
    except OSError as problem:
        raise unreadable(path, problem, name=name) from None


def _identity(facts: os.stat_result) -> tuple[int, int, int, int]:
    return facts.st_dev, facts.st_ino, facts.st_size, facts.st_mtime_ns


def _changed(name: str, when: str) -> SourceChanged:
    return SourceChanged(
        f"{quoted(name)} has changed {when}",
        at=quoted(name),
        cause="its size, time or header is another",
        fix="open the set again, or make it again where it is virtual",
    )


class Reader:
    """Reads runs of the files of a shard; a context manager that closes what it opened.

    bytes_read counts what came out of files, whatever was asked for.
    """

    def __init__(self, files: Mapping[int, DataFile]) -> None:
        self._files = files
        self._stack = ExitStack()
        self._open: dict[int, int] = {}
        self.bytes_read = 0

    def __enter__(self) -> Reader:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        value: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._stack.close()

    @property
    def names(self) -> tuple[str, ...]:
        """The files opened so far."""
        return tuple(self._files[number].name for number in self._open)

    def _descriptor(self, number: int) -> int:
        if number not in self._open:
            file = self._files[number]
            descriptor, facts = self._stack.enter_context(opened(file.path, name=file.name))
            if _identity(facts) != file.identity:
                raise _changed(file.name, "since it was opened")
            self._open[number] = descriptor
        return self._open[number]

    def into(self, address: int, runs: tuple[Run, ...]) -> None:
        """Fill memory from `address` on. Raises IoFailed, SourceChanged, Damaged.

        The caller holds the memory: it must be that large and stay alive.
        """
        pieces = []
        for run in runs:
            descriptor = self._descriptor(run.file)
            for start in range(0, run.nbytes, _PIECE_BYTES):
                size = min(_PIECE_BYTES, run.nbytes - start)
                piece = Run(run.file, run.offset + start, size)
                pieces.append((descriptor, piece, address + start))
            address += run.nbytes
        if len(pieces) < _THREADS:
            for each in pieces:
                self._read(*each)
        else:
            # one thread is as fast as one core copies; the page cache and most disks are faster
            all_of_it = [self._threads.submit(self._read, *each) for each in pieces]
            wait(all_of_it)  # also where one failed: the others still write into this memory
            for done in all_of_it:
                done.result()
        self.bytes_read += sum(run.nbytes for run in runs)

    @cached_property
    def _threads(self) -> ThreadPoolExecutor:
        return self._stack.enter_context(ThreadPoolExecutor(_THREADS))

    def _read(self, descriptor: int, piece: Run, address: int) -> None:
        file = self._files[piece.file]
        memory = memoryview((ctypes.c_ubyte * piece.nbytes).from_address(address)).cast("B")
        done = 0
        while done < piece.nbytes:
            try:
                count = os.preadv(descriptor, [memory[done:]], piece.offset + done)
            except OSError as problem:
                raise unreadable(file.path, problem, name=file.name) from None
            if not count:
                raise damaged(file.name, f"it ends before byte {piece.offset + piece.nbytes:,}")
            done += count


class Mappings:
    """Views of files, mapped once each and privately: writing to a view never reaches a file."""

    def __init__(self, files: Mapping[int, DataFile]) -> None:
        self._files = files
        self._maps: dict[int, torch.UntypedStorage] = {}

    def view(self, tensor: LocalTensor) -> torch.Tensor | None:
        """The tensor without a copy, or None where it is not one aligned run."""
        dtype = tensor.torch_dtype
        if len(tensor.runs) != 1 or tensor.runs[0].offset % dtype.itemsize:
            return None
        run = tensor.runs[0]
        if run.file not in self._maps:
            file = self._files[run.file]
            with opened(file.path, name=file.name) as (descriptor, facts):
                if _identity(facts) != file.identity:
                    raise _changed(file.name, "since it was opened")
                # by descriptor, so that what is mapped is what was looked at
                found = torch.UntypedStorage.from_file(
                    f"/proc/self/fd/{descriptor}", shared=False, nbytes=file.size
                )
                self._maps[run.file] = cast("torch.UntypedStorage", found)
        start, shape = run.offset // dtype.itemsize, tensor.torch_shape
        strides = tuple(prod(shape[dim + 1 :]) for dim in range(len(shape)))
        return torch.empty(0, dtype=dtype).set_(self._maps[run.file], start, shape, strides)
