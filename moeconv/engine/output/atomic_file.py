"""Write files whole or not at all: under a partial name, fsynced, then renamed."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Final

from moeconv.checkpoint.output_files import hidden_name
from moeconv.core.digest import digest
from moeconv.core.system_errors import explained, is_full
from moeconv.errors import DiskFull, IoFailed, WouldOverwrite, quoted
from moeconv.manifest.model import PARTS_DIR
from moeconv.store.file_io import append

NEW_FILE: Final = os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC | os.O_NOFOLLOW
PARTIAL_SUFFIX: Final = ".partial"


def partial_path(out: Path, name: str) -> Path:
    """Return where a file is written before it is complete: in OUT, where no source file can be."""
    # files of one name in several folders are written at the same time
    own = name.removeprefix(f"{PARTS_DIR}/")
    if "/" in own:
        own = digest(os.fsencode(own))
    return out / PARTS_DIR / hidden_name(own, PARTIAL_SUFFIX)


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """Turn an OSError about an output file into IoFailed or DiskFull."""
    try:
        yield
    except OSError as problem:
        raise write_failed(path, problem) from None


def write_failed(path: Path, problem: OSError) -> IoFailed:
    """Return the error for an output file that cannot be opened or written."""
    kind = DiskFull if is_full(problem) else IoFailed
    cause, fix = explained(problem, otherwise="check the disk, then run again")
    return kind(f"cannot write {quoted(path.name)}", at=quoted(str(path)), cause=cause, fix=fix)


@contextmanager
def new_file(path: Path) -> Iterator[int]:
    """Create a file, yield its descriptor, and fsync it at the end.

    If anything fails, the file is removed. Raises OSError.
    """
    descriptor = os.open(path, NEW_FILE, 0o666)
    try:
        yield descriptor
        os.fsync(descriptor)
    except BaseException:
        with suppress(OSError):  # the first failure is the one to report
            os.close(descriptor)
        _drop(path)
        raise
    try:
        os.close(descriptor)
    except OSError:  # network file systems may report lost writes only here
        _drop(path)
        raise


def _drop(path: Path) -> None:
    with suppress(OSError):
        path.unlink()


def write_new(path: Path, data: bytes) -> None:
    """Create a file with these bytes and fsync it. Raises OSError."""
    with new_file(path) as descriptor:
        append(descriptor, data)


def fsync_directory(path: Path) -> None:
    """Make renames in a directory durable. Raises OSError."""
    descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def refuse_file(path: Path) -> None:
    """Raise WouldOverwrite if the name exists."""
    if os.path.lexists(path):
        raise WouldOverwrite(
            f"{quoted(path.name)} exists",
            at=quoted(str(path)),
            cause="existing files are never replaced",
            fix="choose another name with `-o`, or remove the file first",
        )


def write_single(path: Path, data: bytes) -> None:
    """Write a file outside of an output. Raises WouldOverwrite, IoFailed, DiskFull."""
    refuse_file(path)
    partial = path.with_name(hidden_name(path.name, f".{os.getpid()}{PARTIAL_SUFFIX}"))
    with writing(path):
        write_new(partial, data)
        try:
            refuse_file(path)
            partial.rename(path)
            fsync_directory(path.parent)
        finally:
            with suppress(FileNotFoundError):
                partial.unlink()
