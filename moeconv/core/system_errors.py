"""What the operating system says, as one of our own errors: the last net below every call."""

from __future__ import annotations

import errno
import os
import resource
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Final

from moeconv.errors import DiskFull, IoFailed, quoted

_FULL: Final = frozenset({errno.ENOSPC, errno.EDQUOT})
_OF_CALLER: Final = "raised by a function that was given to moeconv"
_FIXES: Final = {
    errno.ENOSPC: "make room, then run again",
    errno.EDQUOT: "make room, then run again",
    errno.ENAMETOOLONG: "use a shorter path or name",
    errno.EACCES: "give yourself the right to it (`ls -ld` shows whose it is), then run again",
    errno.EPERM: "give yourself the right to it (`ls -ld` shows whose it is), then run again",
    errno.EROFS: "use a place that may be written to",
    errno.ELOOP: "replace the link that leads back to itself",
    errno.ENOENT: "check that it is there, and that nothing removes it meanwhile",
    errno.ENOTDIR: "check the path: a file stands where a directory should be",
    errno.EISDIR: "check the path: a directory stands where a file should be",
    errno.EIO: "check the disk and the file, then run again",
    errno.EFBIG: "raise the limit of file sizes (`ulimit -f`), or write to another file system",
    errno.ENODATA: "wait until nothing writes to the file, and check that it is whole",
}


def explained(problem: OSError, *, otherwise: str) -> tuple[str, str]:
    """Cause and fix of a system call that failed; `otherwise` where its errno says no fix."""
    limit = _limit_reached(problem)
    if limit is not None:
        return limit
    cause = problem.strerror or type(problem).__name__
    return cause, _FIXES.get(problem.errno or 0, otherwise)


def _limit_reached(problem: OSError) -> tuple[str, str] | None:
    """Cause and fix where a file could not be opened because too many are open; None otherwise."""
    if problem.errno == errno.ENFILE:
        return "the system has as many files open as it may", "close other programs, then run again"
    if problem.errno != errno.EMFILE:
        return None
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    cause = f"this process has reached its limit of {soft:,} open files"
    if hard == resource.RLIM_INFINITY or hard > soft:
        most = "unlimited" if hard == resource.RLIM_INFINITY else f"{hard:,}"
        return cause, f"raise it with `ulimit -n`, at most to {most}, then run again"
    return cause, "raise the hard limit (`ulimit -Hn`, as root), then run again"


def is_full(problem: OSError) -> bool:
    """Whether there is no room left, on the disk or in a quota."""
    return problem.errno in _FULL


def system_failure(problem: OSError) -> IoFailed:
    """The error for a system call that failed where nothing nearer has words for it."""
    name = problem.filename
    place = os.fsdecode(name) if isinstance(name, str | bytes) else None
    kind = DiskFull if is_full(problem) else IoFailed
    cause, fix = explained(problem, otherwise="check the file system, then run again")
    if not place:  # the directory of the process has no name to be told by
        fix = "check that the directory you are in is still there"
        return kind("a call of the operating system failed", cause=cause, fix=fix)
    return kind(
        f"cannot access {quoted(os.path.basename(place) or place)}",  # noqa: PTH119 - a text
        at=quoted(place),
        cause=cause,
        fix=fix,
    )


@contextmanager
def system_errors() -> Iterator[None]:
    """Turn an OSError that nothing nearer put into words into IoFailed.

    Also a decorator: every function of the library is under it, so that no call of the system
    comes out raw. What a function of the caller raised is left as it is. Raises IoFailed, DiskFull.
    """
    try:
        yield
    except OSError as problem:
        if _OF_CALLER in getattr(problem, "__notes__", ()):
            raise
        raise system_failure(problem) from problem


@contextmanager
def callers_own() -> Iterator[None]:
    """Mark an OSError of a function that the caller gave as none of ours."""
    try:
        yield
    except OSError as problem:
        problem.add_note(_OF_CALLER)
        raise
