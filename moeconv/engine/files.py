"""Files of an output on disk: their partial names, and what the system says in our own words."""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Final

from moeconv.errors import DiskFull, IoFailed, quoted
from moeconv.manifest import PARTS_DIR

NEW_FILE: Final = os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC | os.O_NOFOLLOW
_FULL: Final = frozenset({errno.ENOSPC, errno.EDQUOT})


def partial_path(out: Path, name: str) -> Path:
    """Where a file is written before it is complete: under OUT, where no source's file can be."""
    return out / PARTS_DIR / f".{name.rpartition('/')[2]}.partial"


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
