"""Open a directory: which of its files are the checkpoint, and whether its index agrees."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from typing import Final

from moeconv.checkpoint.config import read_config
from moeconv.checkpoint.header import read_headers
from moeconv.checkpoint.index import (
    INDEX_NAME,
    MAX_INDEX_BYTES,
    Index,
    check_index,
    parse_index,
)
from moeconv.checkpoint.model import Checkpoint, DataFile
from moeconv.checkpoint.warnings import source_warnings
from moeconv.core.names import natural_key
from moeconv.core.text import counted
from moeconv.errors import (
    BadIndex,
    DuplicateTensor,
    MissingShard,
    NoCheckpoint,
    SourceMissing,
    quoted,
)
from moeconv.store.base import File, Store
from moeconv.store.documents import read_document
from moeconv.store.paths import matches

SUFFIX: Final = ".safetensors"
_INDEX_SUFFIX: Final = ".safetensors.index.json"
_WAYS_OUT: Final = (
    "leave the file that is not part of the model out with `--exclude`, or pass `--only-index` to "
    "take exactly what the index names"
)


def data_files(found: Iterable[File]) -> tuple[DataFile, ...]:
    """Read the headers of shards, in natural order."""
    files = sorted(found, key=lambda f: natural_key(f.name))
    return tuple(map(DataFile, files, read_headers(files)))


def open_directory(store: Store, exclude: tuple[str, ...], *, only_index: bool) -> Checkpoint:
    """Open a checkpoint that moeconv did not write, from its headers.

    exclude, only_index: as in `open_checkpoint`. Raises what reading an index and headers raises.
    """
    entries = store.entries()
    # a folder of such a name is refused when it is looked up
    shards = [n for n in (e.rstrip("/") for e in entries) if n.endswith(SUFFIX)]
    shards = [n for n in shards if not matches(n, exclude)]
    index = read_index(store, entries)
    unlisted: list[str] = []
    if index is not None:
        unlisted = [n for n in shards if n not in _named(store, entries)]
        files = _indexed_files(store, index, None if only_index else unlisted)
    elif shards:
        files = data_files([_listed(store, n) for n in shards])
        _check_disjoint(files, fix="pass the index, or leave one of them out with `--exclude`")
    else:
        raise NoCheckpoint(
            f"{quoted(store.address)} holds no safetensors checkpoint",
            cause=_no_checkpoint_cause(entries),
            fix="pass the directory that contains `model*.safetensors`",
        )
    skip = {f.name for f in files} | ({index.name, *unlisted} if index else set())
    sidecars = tuple(_listed(store, n) for n in store.names(exclude=exclude) if n not in skip)
    config = read_config(store)
    found = Checkpoint(store, files, index, config, sidecars, ())
    warnings = source_warnings(index, files, sidecars, has_config=config.present)
    return replace(found, warnings=tuple(warnings))


def _indexed_files(
    store: Store, index: Index, unlisted: Iterable[str] | None
) -> tuple[DataFile, ...]:
    """The files that an index names, and weight files beside it that it does not name.

    unlisted: the latter; None to take what the index names alone. Raises MissingShard,
    DuplicateTensor, TensorNotInFile, TensorNotInIndex.
    """
    listed = [_existing(store, n, named_by=index.name) for n in index.files]
    if unlisted is None:
        files = data_files(listed)
        names: dict[str, set[str]] = {}
        for tensor, file in index.weight_map.items():
            names.setdefault(file, set()).add(tensor)
        files = tuple(replace(f, header=f.header.only(names[f.name])) for f in files)
        beside: tuple[str, ...] = ()
    else:
        beside = tuple(unlisted)
        files = data_files([*listed, *(_listed(store, n) for n in beside)])
        _check_disjoint(files, fix=_WAYS_OUT)
    named = {t.name: f.name for f in files if f.name not in beside for t in f.header.tensors}
    check_index(index, named)
    return files


def _existing(store: Store, name: str, *, named_by: str) -> File:
    """A shard that the index names. Raises MissingShard, UnsafePath."""
    file = store.file(name)
    if file is None:
        raise MissingShard(
            f"{quoted(name)} is missing",
            at=quoted(named_by),
            cause=f"{quoted(named_by)} names it, but it is not in the directory",
            fix="download the shard, then `moeconv inspect SRC`",
        )
    return file


def _listed(store: Store, name: str) -> File:
    """A file that the store lists. Raises UnsafePath, SourceMissing."""
    file = store.file(name)
    if file is None:
        raise SourceMissing(
            f"cannot read {quoted(name)}",
            at=f"{quoted(name)} in {quoted(store.address)}",
            cause="it is a broken link, or was removed meanwhile",
            fix="restore the file, or leave it out with `--exclude`",
        )
    return file


def _no_checkpoint_cause(entries: list[str]) -> str:
    pickles = [n for n in entries if n.endswith((".bin", ".pt", ".pth"))]
    if pickles:
        return f"it has {quoted(pickles[0])}: reading a pickle runs code, so moeconv reads none"
    return f"none of its {counted(len(entries), 'entry', 'entries')} ends in `{SUFFIX}`"


def _indexes(entries: list[str]) -> list[str]:
    # a folder of such a name is refused when it is looked up
    return [n for n in (e.rstrip("/") for e in entries) if n.endswith(_INDEX_SUFFIX)]


def _named(store: Store, entries: list[str]) -> set[str]:
    """The files that any index of the directory names: there may be one for another program."""
    named: set[str] = set()
    for name in _indexes(entries):
        raw = read_document(_listed(store, name), MAX_INDEX_BYTES)
        named.update(parse_index(raw, name=name).files)
    return named


def read_index(store: Store, entries: list[str]) -> Index | None:
    found = _indexes(entries)
    name = INDEX_NAME if INDEX_NAME in found else next(iter(found), None)
    if name is None:
        return None
    if name != INDEX_NAME and len(found) > 1:
        raise BadIndex(
            f"{quoted(store.address)} has {len(found)} index files, none of them `{INDEX_NAME}`",
            cause=f"they are {', '.join(map(quoted, found))}",
            fix="keep only one of them in the directory",
        )
    return parse_index(read_document(_listed(store, name), MAX_INDEX_BYTES), name=name)


def _check_disjoint(files: tuple[DataFile, ...], *, fix: str) -> None:
    first: dict[str, str] = {}
    for file in files:
        for tensor in file.header.tensors:
            if tensor.name in first:
                raise DuplicateTensor(
                    f"{quoted(tensor.name)} is in two files",
                    at=f"{quoted(first[tensor.name])} and {quoted(file.name)}",
                    cause="programs differ in which of the two they load",
                    fix=fix,
                )
            first[tensor.name] = file.name
