"""Open and read input files: regular files only, without blocking on pipes, bounded in size."""

from __future__ import annotations

import os
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from moeconv.core.digest import hasher
from moeconv.core.system_errors import explained
from moeconv.errors import IoFailed, LfsPointer, Malformed, UnsafePath, quoted
from moeconv.store.base import File
from moeconv.store.file_io import FileEnded, read_available

CHECK_READABLE = "check that the file exists and may be read"
LFS_MARK = b"version https://git-lfs.github.com/spec/"


@contextmanager
def opened(path: Path, *, name: str) -> Iterator[tuple[int, os.stat_result]]:
    """A descriptor of a regular file, and its `fstat`. Raises IoFailed, UnsafePath."""
    try:
        descriptor = open_regular(path, name=name)
    except OSError as problem:
        raise unreadable(path, problem, name=name) from None
    try:
        yield descriptor, os.fstat(descriptor)
    finally:
        os.close(descriptor)


def open_regular(path: Path, *, name: str) -> int:
    """A descriptor of a regular file, to be closed by the caller. Raises OSError, UnsafePath."""
    # without O_NONBLOCK, opening a pipe would wait for a writer
    descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
    try:
        if not stat.S_ISREG(os.fstat(descriptor).st_mode):
            raise UnsafePath(
                f"{quoted(name)} is not a regular file",
                at=quoted(str(path)),
                cause="pipes, devices and directories cannot be read as files",
                fix="replace it with a regular file",
            )
    except BaseException:
        os.close(descriptor)
        raise
    return descriptor


def unreadable(path: Path, problem: OSError, *, name: str) -> IoFailed:
    """The error for an input file that cannot be read."""
    cause, fix = explained(problem, otherwise=CHECK_READABLE)
    return IoFailed(f"cannot read {quoted(name)}", at=quoted(str(path)), cause=cause, fix=fix)


def read_document(file: File, limit: int) -> bytes:
    """All bytes of a small file. Raises IoFailed, UnsafePath, LfsPointer, Malformed (too large)."""
    if file.size > limit:
        raise Malformed(
            f"{quoted(file.name)} is too large",
            at=quoted(file.name),
            cause=f"it has {file.size:,} bytes, the limit is {limit:,}",
            fix="check that this is the right file",
        )
    raw = file.read(0, file.size)
    refuse_lfs(raw, file.name)
    return raw


def refuse_lfs(start: bytes, name: str) -> None:
    """Raise LfsPointer where a file begins as Git-LFS pointers do."""
    if start.startswith(LFS_MARK):
        raise LfsPointer(
            f"{quoted(name)} is a Git-LFS pointer, not the file itself",
            at=quoted(name),
            cause="the repository was cloned without its large files",
            fix="run `git lfs pull` there, or fetch it with `hf download`",
        )


def file_digest(path: Path, *, name: str) -> str:
    """The digest of a whole file, read through a small buffer. Raises IoFailed, UnsafePath."""
    state = hasher()
    buffer = memoryview(bytearray(1 << 20))
    with opened(path, name=name) as (descriptor, facts):
        done = 0
        try:
            while count := read_available(descriptor, buffer, done):
                state.update(buffer[:count])
                done += count
            if done < facts.st_size:
                raise FileEnded(done)
        except OSError as problem:
            raise unreadable(path, problem, name=name) from None
    return state.hexdigest()
