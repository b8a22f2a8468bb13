"""Warnings about a source that do not prevent converting it."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from typing import Final

from moeconv.checkpoint.index import Index
from moeconv.checkpoint.model import DataFile
from moeconv.core.text import counted, human_size
from moeconv.errors import quoted
from moeconv.store.base import File
from moeconv.store.documents import LFS_MARK
from moeconv.store.local import LocalFile

_NUMBERED = re.compile(r"(.+)-([0-9]{1,9})-of-([0-9]{1,9})\.safetensors", re.DOTALL)
_POINTER_BYTES: Final = 1024


def source_warnings(
    index: Index | None,
    files: tuple[DataFile, ...],
    sidecars: tuple[File, ...],
    *,
    has_config: bool,
) -> Iterator[str]:
    """One sentence for each warning."""
    listed = set(index.files) if index else set()
    tensor_bytes = sum(f.nbytes for f in files if f.name in listed)
    if index is None:
        yield from missing_shards(f.name for f in files)
    elif index.total_size not in {tensor_bytes, sum(f.nbytes for f in files)}:
        total = index.total_size
        what = "has no total_size" if total is None else f"has total_size {total:,}"
        yield f"{quoted(index.name)} {what}; the tensors have {tensor_bytes:,} bytes"
    for file in files if index else ():
        if file.name not in listed:
            yield (
                f"{quoted(file.name)} is not in the index; its "
                f"{counted(len(file.header.tensors), 'tensor')} are converted like all others "
                "(`--exclude` or `--only-index` leaves it out)"
            )
    for sidecar in sidecars:
        if sidecar.name.endswith(".safetensors"):
            yield (
                f"{quoted(sidecar.name)} ({human_size(sidecar.size)}) is not in the index; copied "
                "as it is (`--exclude` leaves it out)"
            )
    for sidecar in sidecars:
        if _is_pointer(sidecar):
            yield (
                f"{quoted(sidecar.name)} is a Git-LFS pointer, not the file itself; copied as it is"
            )
    if not has_config:
        yield "there is no config.json, so the number of experts cannot be checked"


def missing_shards(names: Iterable[str]) -> Iterator[str]:
    """Warn where file names give a larger number of shards than there are.

    Some published names are wrong, so this is not an error.
    """
    rows: dict[tuple[str, int], set[int]] = {}
    for match in map(_NUMBERED.fullmatch, names):
        if match:
            rows.setdefault((match[1], int(match[3])), set()).add(int(match[2]))
    for (stem, count), there in rows.items():
        if len(there) < count:
            yield (
                f"{quoted(stem)} has {len(there)} of the {count} shards that its file names "
                "imply, and no index lists them"
            )


def _is_pointer(sidecar: File) -> bool:
    # the Hub sends the file that a pointer refers to
    if not isinstance(sidecar, LocalFile) or not len(LFS_MARK) <= sidecar.size <= _POINTER_BYTES:
        return False
    return sidecar.read(0, len(LFS_MARK)) == LFS_MARK
