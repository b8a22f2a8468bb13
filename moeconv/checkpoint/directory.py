"""Open a directory: which of its files are the checkpoint, and whether its index agrees."""

from __future__ import annotations

from collections.abc import Iterable
from contextlib import suppress
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
    MoeconvError,
    NoCheckpoint,
    SourceMissing,
    UnsafePath,
    UsageProblem,
    quoted,
)
from moeconv.manifest.model import PARTS_DIR
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


def open_directory(
    store: Store, exclude: tuple[str, ...], *, only_index: bool, beside: tuple[str, ...]
) -> Checkpoint:
    """Open a checkpoint that moeconv did not write, from its headers.

    exclude, only_index, beside: as in `open_checkpoint`. Raises what reading
    an index and headers raises.
    """
    entries = store.entries()
    # a folder of such a name is refused when it is looked up
    names = [e.rstrip("/") for e in entries]
    index = read_index(store, entries)
    shards = [n for n in (names if index is None else entries) if n.endswith(SUFFIX)]
    shards = [n for n in shards if not matches(n, (*exclude, *(beside if index else ())))]
    left_out: set[str] = set()
    if only_index and index is None:
        raise UsageProblem(
            "`--only-index` needs an index",
            cause=f"{quoted(store.address)} has no `{INDEX_NAME}`",
            fix="drop `--only-index`",
        )
    if index is not None and only_index:
        files = _files_of(store, index)
        left_out = {n for n in entries if n.endswith((SUFFIX, _INDEX_SUFFIX))}
    elif index is not None:
        others = _files_of_other_indexes(store, entries, index)
        files = _files_and_beside(store, index, [n for n in shards if n not in others])
    elif shards:
        files = data_files([_listed(store, n) for n in shards])
        _check_disjoint(files, fix="pass the index, or leave one of them out with `--exclude`")
    else:
        raise NoCheckpoint(
            f"{quoted(store.address)} holds no safetensors checkpoint",
            cause=_no_checkpoint_cause(entries),
            fix="pass the directory that contains `model*.safetensors`",
        )
    skip = left_out | {f.name for f in files} | ({index.name} if index else set())
    sidecars = tuple(_listed(store, n) for n in store.names(exclude=exclude) if n not in skip)
    config = read_config(store)
    found = Checkpoint(store, files, index, config, sidecars, ())
    warnings = source_warnings(index, files, sidecars, has_config=config.present)
    return replace(found, warnings=tuple(warnings))


def _files_of(store: Store, index: Index) -> tuple[DataFile, ...]:
    """The files that an index names, with the tensors that it names there.

    Raises MissingShard, TensorNotInFile.
    """
    names: dict[str, set[str]] = {}
    for tensor, file in index.weight_map.items():
        names.setdefault(file, set()).add(tensor)
    whole = data_files(_existing(store, n, named_by=index.name) for n in index.files)
    files = tuple(replace(f, header=f.header.only(names[f.name])) for f in whole)
    check_index(index, _places(files))
    return files


def _files_and_beside(store: Store, index: Index, shards: list[str]) -> tuple[DataFile, ...]:
    """The files that an index names, and the other weight files beside it.

    shards: the weight files of the directory. Raises MissingShard, DuplicateTensor,
    TensorNotInFile, TensorNotInIndex.
    """
    named = index.files
    listed = [_existing(store, n, named_by=index.name) for n in named]
    beside = [_listed(store, n) for n in shards if n not in named]
    files = data_files([*listed, *beside])
    _check_disjoint(files, fix=_WAYS_OUT)
    others = {f.name for f in beside}
    check_index(index, _places(f for f in files if f.name not in others))
    return files


def _places(files: Iterable[DataFile]) -> dict[str, str]:
    """The file of each tensor, by name."""
    named = ((f.name, f.header) for f in files)
    return {tensor.name: file for file, header in named for tensor in header.tensors}


def _existing(store: Store, name: str, *, named_by: str) -> File:
    """A shard that the index names. Raises MissingShard, UnsafePath."""
    if name.startswith(f"{PARTS_DIR}/"):
        raise UnsafePath(
            f"{quoted(name)} is where moeconv keeps its own documents",
            at=quoted(named_by),
            cause="its files are written there while an output is made",
            fix="move the file to another directory, and change the index",
        )
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


def _files_of_other_indexes(store: Store, entries: list[str], index: Index) -> set[str]:
    """The files that another index names: a copy of the model for another program."""
    found: set[str] = set()
    for name in _indexes(entries):
        # one that cannot be read is a sidecar like any other
        with suppress(MoeconvError):
            if name != index.name:
                raw = read_document(_listed(store, name), MAX_INDEX_BYTES)
                found.update(parse_index(raw, name=name).files)
    return found - set(index.files)


def read_index(store: Store, entries: list[str]) -> Index | None:
    """The index that loaders follow, if there is one. Raises BadIndex, UnsafePath, BadJson."""
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
    for name, header in ((f.name, f.header) for f in files):
        for tensor in header.tensors:
            if tensor.name in first:
                raise DuplicateTensor(
                    f"{quoted(tensor.name)} is in two files",
                    at=f"{quoted(first[tensor.name])} and {quoted(name)}",
                    cause="programs differ in which of the two they load",
                    fix=fix,
                )
            first[tensor.name] = name
