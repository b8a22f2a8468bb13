"""What is odd in a directory and hinders nothing: said, so that nobody has to find it later."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from typing import Final

from moeconv.checkpoint.index import Index
from moeconv.checkpoint.sidecars import Sidecar
from moeconv.core.text import human_size
from moeconv.errors import quoted
from moeconv.store.documents import LFS_MARK, opened, read_start, unreadable

_NUMBERED = re.compile(r"(.+)-([0-9]{1,9})-of-([0-9]{1,9})\.safetensors", re.DOTALL)
_POINTER_BYTES: Final = 1024


def source_warnings(
    index: Index | None,
    shards: tuple[str, ...],
    tensor_bytes: int,
    beside: tuple[Sidecar, ...],
    *,
    has_config: bool,
) -> Iterator[str]:
    """A sentence for each. shards: names of the data files; tensor_bytes: what they hold."""
    if index is None:
        yield from short_rows(shards)
    elif index.total_size != tensor_bytes:
        total = index.total_size
        what = "has no total_size" if total is None else f"says total_size {total:,}"
        yield f"{quoted(index.name)} {what}; the tensors have {tensor_bytes:,} bytes"
    for sidecar in beside:
        if sidecar.name.endswith(".safetensors"):
            yield (
                f"{quoted(sidecar.name)} ({human_size(sidecar.size)}) is not in the index; copied "
                "as it is (`--exclude` leaves it out)"
            )
    for sidecar in beside:
        if sidecar.size <= _POINTER_BYTES and _is_pointer(sidecar):
            yield (
                f"{quoted(sidecar.name)} is a Git-LFS pointer, not the file itself; copied as it is"
            )
    if not has_config:
        yield "there is no config.json; nothing says how many experts there should be"


def short_rows(names: Iterable[str]) -> Iterator[str]:
    """Names that say how many shards there are; some published ones lie, so it is no refusal."""
    rows: dict[tuple[str, int], set[int]] = {}
    for match in map(_NUMBERED.fullmatch, names):
        if match:
            rows.setdefault((match[1], int(match[3])), set()).add(int(match[2]))
    for (stem, count), there in rows.items():
        if len(there) < count:
            yield (
                f"{len(there)} of the {count} shards that the names of {quoted(stem)} speak of are "
                "there, and no index says whether that is all"
            )


def _is_pointer(beside: Sidecar) -> bool:
    with opened(beside.path, name=beside.name) as (descriptor, facts):
        try:
            return read_start(descriptor, facts, len(LFS_MARK)) == LFS_MARK
        except OSError as problem:
            raise unreadable(beside.path, problem, name=beside.name) from None
