"""The documents of an output on disk: sizes are bounded and digests checked before use."""

from __future__ import annotations

import os
from collections import Counter
from contextlib import suppress
from typing import Final

from moeconv.checkpoint.header import Header, parse_header
from moeconv.core.digest import digest
from moeconv.core.names import MAX_FILE_NAME_BYTES
from moeconv.core.text import quoted_list
from moeconv.errors import Damaged, MissingShard, Unfinished, quoted
from moeconv.manifest.model import (
    MAX_DOCUMENT_BYTES,
    MAX_ROOT_BYTES,
    PARTS_DIR,
    ROOT_NAME,
    FileEntry,
    Part,
    Root,
    part_name,
)
from moeconv.manifest.reader import parse_root
from moeconv.store.base import Store
from moeconv.store.documents import read_document

FILLED_SUFFIX: Final = ".filled"
FILLED_ROOT: Final = f"{PARTS_DIR}/.root{FILLED_SUFFIX}"


def hidden_name(name: str, suffix: str) -> str:
    """The name `.NAME` + `suffix` of a temporary file or directory in place of NAME.

    Where that is too long for a file system, NAME is replaced by its digest.
    """
    hidden = f".{name}{suffix}"
    if len(os.fsencode(hidden)) <= MAX_FILE_NAME_BYTES:
        return hidden
    return f".{digest(os.fsencode(name))}{suffix}"


def filled_name(part: str) -> str:
    """The temporary name of a part with added digests, until the root that names it is written."""
    return f"{PARTS_DIR}/{hidden_name(part.rpartition('/')[2], FILLED_SUFFIX)}"


def _differing_tensors(header: Header, part: Part) -> list[str]:
    """Names of tensors that a file's header and its part describe differently, or one of them."""
    listed = {t.name: t for t in part.tensors}
    names = []
    if len(listed) < len(part.tensors):
        names = [name for name, n in Counter(t.name for t in part.tensors).items() if n > 1]
    for a in header.tensors:
        b = listed.pop(a.name, None)
        if b is None or (a.dtype, a.shape, a.offset, a.offset + a.nbytes) != (
            b.dtype,
            b.shape,
            b.start,
            b.stop,
        ):
            names.append(a.name)
    return [*names, *listed]


def header_of(part: Part, raw: bytes, parsed: Header | None = None) -> Header:
    """The header of a data file, if its 8 + N bytes `raw` are those that its part records.

    parsed: the header, if it was parsed already. Raises Damaged, BadHeader or one of its classes.
    """
    if len(raw) != part.header_size or digest(raw) != part.header_digest:
        raise damaged(part.file, "its header is not the one that was written")
    return parsed or parse_header(raw, file_size=part.size, file=0, where=part.file)


def tensor_problems(header: Header, part: Part) -> list[Damaged]:
    """One error that names all tensors on which a header and its part differ; empty if none."""
    names = _differing_tensors(header, part)
    if not names:
        return []
    return [
        damaged(
            part_name(part.file), f"it lists other tensors than the header: {quoted_list(names)}"
        )
    ]


def check_header(part: Part, raw: bytes, parsed: Header | None = None) -> None:
    """Check the header of a data file against its part. Parameters and errors as `header_of`."""
    for problem in tensor_problems(header_of(part, raw, parsed), part):
        raise problem


def check_data_file(part: Part, size: int, raw: bytes, parsed: Header | None = None) -> None:
    """Check size and header of a data file against its part, as `check_header` does.

    Raises Damaged, BadHeader or one of its classes.
    """
    if size != part.size:
        raise damaged(part.file, f"it has {size:,} bytes; its part says {part.size:,}")
    check_header(part, raw, parsed)


def damaged(name: str, cause: str) -> Damaged:
    """The error for a file of an output that is not as it was written."""
    return Damaged(
        f"{quoted(name)} is damaged",
        at=quoted(name),
        cause=cause,
        fix="fetch that file again, or convert again",
    )


def missing(name: str) -> MissingShard:
    """The error for a file of an output that does not exist."""
    return MissingShard(
        f"{quoted(name)} is missing",
        at=quoted(ROOT_NAME),
        cause="the output's manifest names it",
        fix="fetch that file again, or convert again",
    )


def unfinished(address: str) -> Unfinished:
    """The error for an output whose run is not finished, or was interrupted."""
    return Unfinished(
        f"{quoted(address.rpartition('/')[2])} is an unfinished moeconv output",
        at=quoted(address),
        cause=f"it has `{PARTS_DIR}/` but no `{ROOT_NAME}`, which is written last",
        fix="wait until it is complete, or convert again with `--resume` or `--overwrite`",
    )


def read_named(store: Store, name: str, *, limit: int) -> bytes:
    """All bytes of an output's file, at most `limit`. Raises MissingShard, Malformed, IoFailed."""
    file = store.file(name)
    if file is None:
        raise missing(name)
    return read_document(file, limit)


def read_entry(store: Store, entry: FileEntry, *, limit: int = MAX_DOCUMENT_BYTES) -> bytes:
    """The bytes of a document that the root names, checked against size and digest.

    Where adding digests was interrupted after the root was replaced, they are those of the new
    document, which is not renamed yet.
    """
    try:
        return _read_checked(store, entry, limit=limit)
    except (Damaged, MissingShard):
        filled = FileEntry(filled_name(entry.name), entry.size, entry.digest)
        with suppress(Damaged, MissingShard):
            return _read_checked(store, filled, limit=limit)
        raise


def _read_checked(store: Store, entry: FileEntry, *, limit: int) -> bytes:
    file = store.file(entry.name)
    if file is None:
        raise missing(entry.name)
    if file.size != entry.size:
        raise damaged(entry.name, f"its size is not the {entry.size:,} bytes in the manifest")
    raw = read_document(file, limit)
    if digest(raw) != entry.digest:
        raise damaged(entry.name, "its digest is not the one in the manifest")
    return raw


def read_root(store: Store) -> Root:
    """The root of an output. Raises Damaged, BadManifest, MissingShard, IoFailed."""
    return parse_root(read_named(store, ROOT_NAME, limit=MAX_ROOT_BYTES))
