"""Open SRC: a directory, a single file, or a moeconv output, as one frozen value."""

from __future__ import annotations

from collections.abc import Iterable
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Final

from moeconv.checkpoint.config import CONFIG_NAME, Config, read_config
from moeconv.checkpoint.header import Header, StoredTensor, read_headers
from moeconv.checkpoint.index import (
    INDEX_NAME,
    MAX_INDEX_BYTES,
    Index,
    check_index,
    parse_index,
)
from moeconv.checkpoint.output import RecordedDocuments, foreign_files, open_output
from moeconv.checkpoint.output_files import missing, read_root, unfinished
from moeconv.checkpoint.warnings import missing_shards, source_warnings
from moeconv.core.digest import digest
from moeconv.core.names import natural_key
from moeconv.core.system_errors import explained
from moeconv.core.text import counted, quoted_list
from moeconv.errors import (
    BadIndex,
    DuplicateTensor,
    MissingShard,
    NoCheckpoint,
    SourceChanged,
    SourceMissing,
    UnsafePath,
    quoted,
)
from moeconv.manifest.model import ORIGIN_NAME, PARTS_DIR, ROOT_NAME, Manifest, SourceEntry
from moeconv.store.base import File, Store
from moeconv.store.documents import read_document
from moeconv.store.hub import SCHEME, HubStore
from moeconv.store.local import LocalFile, LocalStore
from moeconv.store.paths import matches, refuse_unsafe_name

SUFFIX: Final = ".safetensors"
_OTHERS: Final = frozenset({".json", ".bin", ".pt", ".pth", ".ckpt", ".gguf", ".md", ".txt"})
_INDEX_SUFFIX: Final = ".safetensors.index.json"


@dataclass(frozen=True, slots=True)
class DataFile:
    """One shard: the file, and its header."""

    file: File
    header: Header

    @property
    def name(self) -> str:
        """Its name in the checkpoint."""
        return self.file.name

    @property
    def path(self) -> Path:
        """The local file, links followed. Raises NotLocal."""
        return self.file.path

    @property
    def size(self) -> int:
        """Bytes, with the header."""
        return self.file.size

    @property
    def mtime_ns(self) -> int:
        """When it was last changed."""
        return self.file.mtime_ns


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """A checkpoint's facts, read from headers only. `own` is set for outputs of moeconv.

    store: where its bytes are. sidecars: the files without tensors, copied byte for byte.
    virtual: the virtual output that was opened, whose bytes are in this checkpoint.
    """

    store: Store
    files: tuple[DataFile, ...]
    index: Index | None
    config: Config
    sidecars: tuple[File, ...]
    warnings: tuple[str, ...]
    own: RecordedDocuments | None = None
    virtual: RecordedDocuments | None = None

    @property
    def stored(self) -> dict[tuple[str, str], StoredTensor]:
        """All tensors by file and name: the files of several ranks have tensors of one name."""
        return {(f.name, t.name): t for f in self.files for t in f.header.tensors}

    @property
    def origin(self) -> RecordedDocuments | None:
        """The output that records the first foreign source: this one, or the virtual one."""
        return self.virtual or self.own

    @property
    def tensors(self) -> tuple[StoredTensor, ...]:
        """All tensors, file by file in header order."""
        return tuple(t for f in self.files for t in f.header.tensors)

    @property
    def manifest(self) -> Manifest | None:
        """The manifest of an output of moeconv."""
        return self.own.manifest if self.own else None

    @property
    def tensor_bytes(self) -> int:
        """Bytes of all data sections."""
        return sum(f.size - f.header.data_start for f in self.files)


def locate(src: str | Path) -> Path:
    """The local path of SRC; a repository on the Hub is downloaded, unless the cache has all of it.

    Raises SourceMissing, DownloadFailed, UsageProblem.
    """
    place = locate_headers(src)
    return place if isinstance(place, Path) else place.download()


def locate_headers(src: str | Path) -> Path | HubStore:
    """The local path of SRC, or the repository on the Hub whose files are not all in the cache.

    Raises SourceMissing, DownloadFailed, UsageProblem.
    """
    text = str(src)
    if text.startswith(SCHEME):
        hub = HubStore(text)
        return hub.snapshot() or hub
    path = Path(text)
    give = "pass a directory, a `.safetensors` file, or `hf://org/name`"
    try:
        there = path.exists()
    except OSError as problem:
        cause, fix = explained(problem, otherwise=give)
        raise SourceMissing(f"{quoted(text)} cannot be reached", cause=cause, fix=fix) from None
    if not there:
        raise SourceMissing(
            f"{quoted(text)} does not exist",
            cause="no such file or directory",
            fix=give,
        )
    return path


def open_checkpoint(src: Path | Store, *, exclude: tuple[str, ...] = ()) -> Checkpoint:
    """Read all headers, the index, config.json; list the sidecars. Opens no data.

    exclude: globs of sidecars to leave out. Raises the classes of `errors.files`.
    """
    if isinstance(src, Path) and src.is_file():
        return _open_file(src)
    store = LocalStore(src) if isinstance(src, Path) else src
    if _holds(store, ROOT_NAME):
        return _open_own(store, exclude)
    if _unfinished(store):
        raise unfinished(store.address)
    return _open_directory(store, exclude)


def _holds(store: Store, name: str) -> bool:
    """Whether there is a file of this name that can be read; others are reported when listed."""
    with suppress(UnsafePath, SourceMissing):
        return store.file(name) is not None
    return False


def _unfinished(store: Store) -> bool:
    """Whether `moeconv/` is that of an unfinished run, not just a directory of that name."""
    if _holds(store, f"{PARTS_DIR}/journal") or _holds(store, ORIGIN_NAME):
        return True
    if store.root is None:
        return False
    return any((store.root / PARTS_DIR).glob(".*.partial"))


def _data_files(found: Iterable[File]) -> tuple[DataFile, ...]:
    files = sorted(found, key=lambda f: natural_key(f.name))
    return tuple(map(DataFile, files, read_headers(files)))


def _open_file(path: Path) -> Checkpoint:
    store = LocalStore(path.parent)
    refuse_unsafe_name(path.name, store.address)
    if path.suffix in _OTHERS:
        raise NoCheckpoint(
            f"{quoted(path.name)} is not a safetensors file",
            at=quoted(str(path)),
            cause=f"its name ends in {quoted(path.suffix)}",
            fix="pass the directory of the checkpoint, or one `.safetensors` file",
        )
    _refuse_fragment(store, path.name)
    files = _data_files([LocalFile.at(path, name=path.name)])
    config = store.file(CONFIG_NAME)
    others = () if config is None else (config,)
    warnings = tuple(missing_shards([path.name]))
    return Checkpoint(store, files, None, read_config(store), others, warnings)


def _open_own(store: Store, exclude: tuple[str, ...]) -> Checkpoint:
    own = open_output(store)
    if own.manifest.root.source is not None:
        return _open_virtual(store, own, own.manifest.root.source, exclude)
    found = []
    for part in own.manifest.parts:
        file = store.file(part.file)
        if file is None:
            raise missing(part.file)
        found.append(file)
    files = _data_files(found)
    own.check_headers(tuple((f.name, f.size, f.header) for f in files))
    kept = tuple(s for s in own.sidecars if not matches(s.name, exclude))
    return Checkpoint(
        store, files, None, read_config(store), kept, _foreign_warning(store, own), own
    )


def _open_virtual(
    store: Store, own: RecordedDocuments, source: SourceEntry, exclude: tuple[str, ...]
) -> Checkpoint:
    """The source that a virtual output points into; only the recorded files of it matter.

    Raises SourceMissing, SourceChanged.
    """
    if not Path(source.directory).is_dir():
        raise SourceMissing(
            f"the source of the virtual output {quoted(store.address)} does not exist",
            at=quoted(source.directory),
            cause="there is no such directory",
            fix="restore it; a virtual output has no bytes of its own",
        )
    place = LocalStore(Path(source.directory))
    inner = None
    if place.file(ROOT_NAME) is not None:
        if read_root(place).source is not None:
            raise _changed(source, "it is itself a virtual output, without bytes of its own")
        opened = open_checkpoint(place)
        inner, files = opened.own, opened.files
    else:
        files = _data_files([_pinned(place, f.name, source) for f in source.files])
    wanted = {(f.name, f.size, f.mtime_ns, f.header_digest) for f in source.files}
    there = {(f.name, f.size, f.mtime_ns, digest(f.header.raw)) for f in files}
    changed = sorted({name for name, *_ in wanted ^ there}, key=natural_key)
    if changed:
        raise _changed(source, f"{quoted_list(changed, most=1)}: written to, replaced or removed")
    kept = tuple(s for s in own.sidecars if not matches(s.name, exclude))
    return Checkpoint(place, files, None, read_config(store), kept, (), inner, own)


def _pinned(place: LocalStore, name: str, source: SourceEntry) -> LocalFile:
    file = place.file(name)
    if file is None:
        raise _changed(source, f"{quoted(name)} is missing")
    return file


def _changed(source: SourceEntry, cause: str) -> SourceChanged:
    return SourceChanged(
        f"the source of the virtual output has changed: {cause.partition(':')[0]}",
        at=quoted(source.directory),
        cause=cause,
        fix="create the virtual output again",
    )


def _foreign_warning(store: Store, own: RecordedDocuments) -> tuple[str, ...]:
    """Warn about files that were added to an output, since no command copies them."""
    found = foreign_files(store, own.manifest)
    if not found:
        return ()
    return (f"{quoted_list(found, most=1)} is not part of this output, and is not copied",)


def _refuse_fragment(store: LocalStore, name: str) -> None:
    """Refuse one shard of several: converted alone it would look like a whole model."""
    index = _read_index(store, store.entries())
    if index is not None and name in index.files and len(index.files) > 1:
        raise NoCheckpoint(
            f"{quoted(name)} is one of {len(index.files)} shards",
            at=quoted(str(store.root / name)),
            cause=f"{quoted(index.name)} in the same directory names the others",
            fix=f"pass the directory: {quoted(store.address)}",
        )


def _open_directory(store: Store, exclude: tuple[str, ...]) -> Checkpoint:
    entries = store.entries()
    # a folder of such a name is refused when it is looked up
    shards = [n for n in (e.rstrip("/") for e in entries) if n.endswith(SUFFIX)]
    index = _read_index(store, entries)
    if index is not None:
        files = _data_files([_existing(store, n, named_by=index.name) for n in index.files])
        _check_disjoint(files, fix="download the index and the shards again")
        check_index(index, {t.name: f.name for f in files for t in f.header.tensors})
    elif shards:
        wanted = [n for n in shards if not matches(n, exclude)]
        files = _data_files([_listed(store, n) for n in wanted])
        _check_disjoint(files, fix="pass the index, or leave one of them out with `--exclude`")
    else:
        raise NoCheckpoint(
            f"{quoted(store.address)} holds no safetensors checkpoint",
            cause=_no_checkpoint_cause(entries),
            fix="pass the directory that contains `model*.safetensors`",
        )
    skip = {f.name for f in files} | ({index.name} if index else set())
    sidecars = tuple(_listed(store, n) for n in store.names(exclude=exclude) if n not in skip)
    config = read_config(store)
    found = Checkpoint(store, files, index, config, sidecars, ())
    warnings = source_warnings(
        index, tuple(f.name for f in files), found.tensor_bytes, sidecars, has_config=config.present
    )
    return replace(found, warnings=tuple(warnings))


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
        return f"it has {quoted(pickles[0])}: pickles can run code, so moeconv never reads one"
    return f"none of its {counted(len(entries), 'entry', 'entries')} ends in `{SUFFIX}`"


def _read_index(store: Store, entries: list[str]) -> Index | None:
    found = [n for n in (e.rstrip("/") for e in entries) if n.endswith(_INDEX_SUFFIX)]
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
