"""Turn errors of the operating system into moeconv's own, each with a cause and a fix."""

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
    errno.ENOSPC: "free some space, then run again",
    errno.EDQUOT: "free some space, then run again",
    errno.ENAMETOOLONG: "use a shorter path or name",
    errno.EACCES: "change its permissions (`ls -ld` shows its owner), then run again",
    errno.EPERM: "change its permissions (`ls -ld` shows its owner), then run again",
    errno.EROFS: "choose a location that is not read-only",
    errno.ELOOP: "replace the link that points back to itself",
    errno.ENOENT: "check that it exists and that nothing removes it meanwhile",
    errno.ENOTDIR: "check the path: it has a file where a directory should be",
    errno.EISDIR: "check the path: it has a directory where a file should be",
    errno.EIO: "check the disk and the file, then run again",
    errno.EFBIG: "raise the file size limit (`ulimit -f`), or write to another file system",
    errno.ENODATA: "wait until nothing writes to the file, and check that it is complete",
}


def explained(problem: OSError, *, otherwise: str) -> tuple[str, str]:
    """Cause and fix of a failed system call; `otherwise` is the fix for other error numbers."""
    limit = _limit_reached(problem)
    if limit is not None:
        return limit
    cause = problem.strerror or type(problem).__name__
    return cause, _FIXES.get(problem.errno or 0, otherwise)


def _limit_reached(problem: OSError) -> tuple[str, str] | None:
    """Cause and fix where a file could not be opened because too many are open; None otherwise."""
    if problem.errno == errno.ENFILE:
        return (
            "the system has reached its limit of open files",
            "close other programs, then run again",
        )
    if problem.errno != errno.EMFILE:
        return None
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    cause = f"this process has reached its limit of {soft:,} open files"
    if hard == resource.RLIM_INFINITY or hard > soft:
        most = "unlimited" if hard == resource.RLIM_INFINITY else f"{hard:,}"
        return cause, f"raise it with `ulimit -n`, up to {most}, then run again"
    return cause, "raise the hard limit (`ulimit -Hn`, as root), then run again"


def is_full(problem: OSError) -> bool:
    """Whether the disk or a quota is full."""
    return problem.errno in _FULL


def system_failure(problem: OSError) -> IoFailed:
    """The error for a failed system call that no caller has described."""
    name = problem.filename
    place = os.fsdecode(name) if isinstance(name, str | bytes) else None
    kind = DiskFull if is_full(problem) else IoFailed
    cause, fix = explained(problem, otherwise="check the file system, then run again")
    if not place:  # an error about the current directory has no file name
        fix = "check that the current directory still exists"
        return kind("an operating system call failed", cause=cause, fix=fix)
    return kind(
        f"cannot access {quoted(os.path.basename(place) or place)}",  # noqa: PTH119 - a text
        at=quoted(place),
        cause=cause,
        fix=fix,
    )


@contextmanager
def system_errors() -> Iterator[None]:
    """Turn an OSError that no caller has described into IoFailed.

    Also a decorator: every public function of the library has it, so that none raises a bare
    OSError. What a callback of the user raised is left as it is. Raises IoFailed, DiskFull.
    """
    try:
        yield
    except OSError as problem:
        if _OF_CALLER in getattr(problem, "__notes__", ()):
            raise
        raise system_failure(problem) from problem


@contextmanager
def callers_own() -> Iterator[None]:
    """Mark an OSError raised by a callback of the user, so that `system_errors` leaves it alone."""
    try:
        yield
    except OSError as problem:
        problem.add_note(_OF_CALLER)
        raise
