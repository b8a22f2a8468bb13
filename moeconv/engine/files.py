"""Data files on disk: made under a partial name, written from many threads, then durable."""

from __future__ import annotations

import errno
import os
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Final, TypeAlias

from moeconv.engine.syscalls import copy_in_kernel, reserve, start_writeback
from moeconv.engine.tiles import Digests, Origin
from moeconv.errors import DiskFull, IoFailed, quoted
from moeconv.manifest import PARTS_DIR
from moeconv.plan.values import OutputFile

NEW_FILE: Final = os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC | os.O_NOFOLLOW
Finished: TypeAlias = Callable[[OutputFile, Path, Digests], None]
_FULL: Final = frozenset({errno.ENOSPC, errno.EDQUOT})


def partial_path(out: Path, name: str) -> Path:
    """Where a file is written before it is complete: under OUT, where no source's file can be."""
    return out / PARTS_DIR / f".{name.rpartition('/')[2]}.partial"


class DiskTarget:
    """One output file; `finished` gets it once all of it is on the disk, to name it."""

    def __init__(self, file: OutputFile, out: Path, finished: Finished) -> None:
        self._file = file
        self._path = out / file.name
        self._partial = partial_path(out, file.name)
        self._finished = finished
        self._descriptor = -1
        self._in_kernel = True
        self._writing = threading.Lock()

    def open(self) -> None:
        """Create the file at its full size, with its header. Raises IoFailed, DiskFull."""
        with writing(self._path):
            self._descriptor = os.open(self._partial, NEW_FILE, 0o666)
            reserve(self._descriptor, self._file.size)
        self.write(memoryview(self._file.header), 0)

    def write(self, view: memoryview, offset: int, origin: Origin | None = None) -> None:
        """Write `view` at `offset`, in the kernel where it can. Raises IoFailed, DiskFull."""
        # the kernel lets one thread at a time write to a file, and the others spin meanwhile:
        # here they sleep, or rather read and hash what comes next
        with self._writing, writing(self._path):
            done = 0
            if origin is not None and self._in_kernel:
                source, start = origin
                done = copy_in_kernel(source, start, self._descriptor, offset, len(view))
                # asked once for each file: the answer depends on the two file systems only
                self._in_kernel = done == len(view)
            while done < len(view):
                done += os.pwrite(self._descriptor, view[done:], offset + done)

    def settle(self, offset: int, nbytes: int) -> None:
        """Let the disk begin on a batch while the next one is copied."""
        start_writeback(self._descriptor, offset, nbytes)

    def finish(self, digests: Digests) -> None:
        """Bring it to the disk. Raises IoFailed, DiskFull."""
        with writing(self._path):
            os.fsync(self._descriptor)
        self._finished(self._file, self._partial, digests)

    def close(self) -> None:
        """Close the descriptor."""
        if self._descriptor >= 0:
            os.close(self._descriptor)
            self._descriptor = -1


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """Turn what the system says about an output file into our own error."""
    try:
        yield
    except OSError as problem:
        raise write_failed(path, problem) from None


def write_failed(path: Path, problem: OSError) -> IoFailed:
    """The error for an output file that cannot be written."""
    kind = DiskFull if problem.errno in _FULL else IoFailed
    return kind(
        f"cannot write {quoted(path.name)}",
        at=quoted(str(path)),
        cause=problem.strerror,
        fix="make room, then run again" if kind is DiskFull else "check the disk, then run again",
    )
