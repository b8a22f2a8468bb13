"""Open SRC: a directory, a single file, or a moeconv output, as one frozen value."""

from __future__ import annotations

from pathlib import Path
from typing import Final

from moeconv.checkpoint.config import CONFIG_NAME, read_config
from moeconv.checkpoint.directory import data_files, open_directory, read_index
from moeconv.checkpoint.model import Checkpoint
from moeconv.checkpoint.output import RecordedDocuments, foreign_files, open_output
from moeconv.checkpoint.output_files import missing, read_root, unfinished
from moeconv.checkpoint.warnings import missing_shards
from moeconv.core.digest import digest
from moeconv.core.names import natural_key
from moeconv.core.system_errors import explained
from moeconv.core.text import quoted_list
from moeconv.errors import (
    NoCheckpoint,
    SourceChanged,
    SourceMissing,
    UnsafePath,
    quoted,
)
from moeconv.manifest.model import ORIGIN_NAME, PARTS_DIR, ROOT_NAME, SourceEntry
from moeconv.store.base import Store
from moeconv.store.hub import SCHEME, HubStore
from moeconv.store.local import LocalFile, LocalStore
from moeconv.store.paths import matches, refuse_unsafe_name

_OTHERS: Final = frozenset({".json", ".bin", ".pt", ".pth", ".ckpt", ".gguf", ".md", ".txt"})


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


def open_checkpoint(
    src: Path | Store,
    *,
    exclude: tuple[str, ...] = (),
    only_index: bool = False,
    beside: tuple[str, ...] = (),
) -> Checkpoint:
    """Read all headers, the index, config.json; list the sidecars. Opens no data.

    exclude: globs of files to leave out. only_index: take the tensors that the index names, from
    the files that it names, and no others. beside: globs of weight files that are not part of the
    model, unless the index names them. Raises classes of `moeconv.errors`.
    """
    if isinstance(src, Path) and src.is_file():
        return _open_file(src)
    store = LocalStore(src) if isinstance(src, Path) else src
    if _holds(store, ROOT_NAME, exclude):
        return _open_own(store, exclude)
    if _unfinished(store):
        raise unfinished(store.address)
    return open_directory(store, exclude, only_index=only_index, beside=beside)


def _holds(store: Store, name: str, exclude: tuple[str, ...] = ("*",)) -> bool:
    """Whether there is a file of this name.

    exclude: globs; a file that they match is ignored if it cannot be read. Raises UnsafePath,
    SourceMissing for other files that cannot be read.
    """
    try:
        return store.file(name) is not None
    except (UnsafePath, SourceMissing):
        if matches(name, exclude):
            return False
        raise


def _unfinished(store: Store) -> bool:
    """Whether `moeconv/` is that of an unfinished run, not just a directory of that name."""
    if _holds(store, f"{PARTS_DIR}/journal") or _holds(store, ORIGIN_NAME):
        return True
    if store.root is None:
        return False
    return any((store.root / PARTS_DIR).glob(".*.partial"))


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
    files = data_files([LocalFile.at(path, name=path.name)])
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
    files = data_files(found)
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
        files = data_files([_pinned(place, f.name, source) for f in source.files])
    wanted = {(f.name, f.size, f.mtime_ns, f.header_digest) for f in source.files}
    there = {(f.name, f.size, f.mtime_ns, digest(f.header.raw)) for f in files}
    changed = sorted({name for name, *_ in wanted ^ there}, key=natural_key)
    if changed:
        raise _changed(source, f"{quoted_list(changed, most=1)}: written to, replaced or removed")
    kept = tuple(s for s in own.sidecars if not matches(s.name, exclude))
    warnings = _foreign_warning(store, own)
    return Checkpoint(place, files, None, read_config(store), kept, warnings, inner, own)


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
    index = read_index(store, store.entries())
    if index is not None and name in index.files and len(index.files) > 1:
        raise NoCheckpoint(
            f"{quoted(name)} is one of {len(index.files)} shards",
            at=quoted(str(store.root / name)),
            cause=f"{quoted(index.name)} in the same directory names the others",
            fix=f"pass the directory: {quoted(store.address)}",
        )
