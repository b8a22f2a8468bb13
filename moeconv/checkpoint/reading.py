"""Opening input: regular files only, never waiting for a pipe, never more memory than the file."""

from __future__ import annotations

import os
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from moeconv.digest import hasher
from moeconv.errors import IoFailed, LfsPointer, Malformed, UnsafePath, quoted

LFS_MARK = b"version https://git-lfs.github.com/spec/"


@contextmanager
def opened(path: Path, *, name: str) -> Iterator[tuple[int, os.stat_result]]:
    """A descriptor of a regular file, and its facts. Raises IoFailed, UnsafePath."""
    try:
        # without O_NONBLOCK, opening a pipe would wait for somebody to write
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
    except OSError as problem:
        raise unreadable(path, problem, name=name) from None
    try:
        facts = os.fstat(descriptor)
        if not stat.S_ISREG(facts.st_mode):
            raise UnsafePath(
                f"{quoted(name)} is not a regular file",
                at=quoted(str(path)),
                cause="pipes, devices and directories are not read",
                fix="put the file itself there",
            )
        yield descriptor, facts
    finally:
        os.close(descriptor)


def unreadable(path: Path, problem: OSError, *, name: str) -> IoFailed:
    """The error for an input file that cannot be read."""
    return IoFailed(
        f"cannot read {quoted(name)}",
        at=quoted(str(path)),
        cause=problem.strerror or type(problem).__name__,
        fix="check that the file exists and may be read",
    )


def read_start(descriptor: int, count: int) -> bytes:
    """At most `count` bytes from the start; allocates what the file has, not what was asked."""
    out = bytearray()
    size = min(count, os.fstat(descriptor).st_size)
    while len(out) < size:
        data = os.pread(descriptor, min(size - len(out), 1 << 24), len(out))
        if not data:
            break
        out += data
    return bytes(out)


def read_document(path: Path, limit: int, *, name: str) -> bytes:
    """All bytes of a small file. Raises IoFailed, UnsafePath, LfsPointer, Malformed (too large)."""
    with opened(path, name=name) as (descriptor, facts):
        if facts.st_size > limit:
            raise Malformed(
                f"{quoted(name)} is too large",
                at=quoted(str(path)),
                cause=f"it has {facts.st_size:,} bytes, the limit is {limit:,}",
                fix="check that it is the file it should be",
            )
        try:
            raw = read_start(descriptor, limit)
        except OSError as problem:
            raise unreadable(path, problem, name=name) from None
    refuse_lfs(raw, name)
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
    with opened(path, name=name) as (descriptor, _):
        done = 0
        try:
            while count := os.preadv(descriptor, [buffer], done):
                state.update(buffer[:count])
                done += count
        except OSError as problem:
            raise unreadable(path, problem, name=name) from None
    return state.hexdigest()
