"""Files of an output on disk: their partial names, and what the system says in our own words."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Final

from moeconv.checkpoint.output_files import hidden_name
from moeconv.core.system_errors import explained, is_full
from moeconv.errors import DiskFull, IoFailed, quoted
from moeconv.manifest.model import PARTS_DIR
from moeconv.store.file_io import append

NEW_FILE: Final = os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC | os.O_NOFOLLOW
PARTIAL_SUFFIX: Final = ".partial"


def partial_path(out: Path, name: str) -> Path:
    """Where a file is written before it is complete: under OUT, where no source's file can be."""
    return out / PARTS_DIR / hidden_name(name.rpartition("/")[2], PARTIAL_SUFFIX)


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """Turn what the system says about an output file into our own error."""
    try:
        yield
    except OSError as problem:
        raise write_failed(path, problem) from None


def write_failed(path: Path, problem: OSError) -> IoFailed:
    """The error for an output file that cannot be opened or written."""
    kind = DiskFull if is_full(problem) else IoFailed
    cause, fix = explained(problem, otherwise="check the disk, then run again")
    return kind(f"cannot write {quoted(path.name)}", at=quoted(str(path)), cause=cause, fix=fix)


@contextmanager
def new_file(path: Path) -> Iterator[int]:
    """A descriptor of a file that did not exist; at the end its bytes are on the disk.

    Where anything fails, the file is removed again. Raises OSError.
    """
    descriptor = os.open(path, NEW_FILE, 0o666)
    try:
        yield descriptor
        os.fsync(descriptor)
    except BaseException:
        with suppress(OSError):  # what failed first is what is reported
            os.close(descriptor)
        _drop(path)
        raise
    try:
        os.close(descriptor)
    except OSError:  # disks over a network may say only then that they lost something
        _drop(path)
        raise


def _drop(path: Path) -> None:
    with suppress(OSError):
        path.unlink()


def write_new(path: Path, data: bytes) -> None:
    """Write a whole new file to the disk. Raises OSError."""
    with new_file(path) as descriptor:
        append(descriptor, data)
