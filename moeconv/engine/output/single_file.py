"""One small file that stands alone: whole under its name, or not there."""

from __future__ import annotations

import os
from contextlib import suppress
from pathlib import Path

from moeconv.checkpoint.output_files import hidden_name
from moeconv.engine.output.atomic_file import PARTIAL_SUFFIX, write_new, writing
from moeconv.engine.output.transaction import fsync_directory
from moeconv.errors import WouldOverwrite, quoted


def refuse_file(path: Path) -> None:
    """Raise WouldOverwrite where something has the name already."""
    if os.path.lexists(path):
        raise WouldOverwrite(
            f"{quoted(path.name)} exists",
            at=quoted(str(path)),
            cause="a file is never replaced",
            fix="give another name with `-o`, or remove it first",
        )


def write_single(path: Path, data: bytes) -> None:
    """Write a new file through a partial one. Raises WouldOverwrite, IoFailed, DiskFull."""
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
