"""Open SRC: a directory, a single file, or a moeconv output, as one frozen value."""

from __future__ import annotations

import os
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Final

from moeconv.checkpoint.config import CONFIG_NAME, Config, read_config
from moeconv.checkpoint.header import Header, StoredTensor, read_header
from moeconv.checkpoint.index import INDEX_NAME, MAX_INDEX_BYTES, Index, parse_index
from moeconv.checkpoint.output import OutputDocuments, foreign_files, open_output
from moeconv.checkpoint.output_files import missing, read_root
from moeconv.checkpoint.sidecars import Sidecar, sidecar, sidecars
from moeconv.checkpoint.warnings import missing_shards, source_warnings
from moeconv.core.digest import digest
from moeconv.core.names import natural_key
from moeconv.core.system_errors import explained
from moeconv.core.text import counted, quoted_list
from moeconv.errors import (
    BadIndex,
    DuplicateTensor,
    MoeconvError,
    NoCheckpoint,
    SourceChanged,
    SourceMissing,
    TensorNotInFile,
    TensorNotInIndex,
    Unfinished,
    quoted,
)
from moeconv.manifest.model import ORIGIN_NAME, PARTS_DIR, ROOT_NAME, Manifest, SourceEntry
from moeconv.store import hub
from moeconv.store.documents import read_document
from moeconv.store.paths import existing_file, matches, refuse_unsafe_name, resolve_inside

SUFFIX: Final = ".safetensors"
_OTHERS: Final = frozenset({".json", ".bin", ".pt", ".pth", ".ckpt", ".gguf", ".md", ".txt"})
_INDEX_SUFFIX: Final = ".safetensors.index.json"
_MAX_REPORTED: Final = 20


@dataclass(frozen=True, slots=True)
class DataFile:
    """One shard: its name, the real file (links followed), and that file's size and time."""

    name: str
    path: Path
    size: int
    mtime_ns: int
    header: Header


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """A checkpoint's facts, read from headers only. `own` is set for outputs of moeconv.

    virtual: the virtual output that was opened, whose bytes are in this checkpoint.
    """

    root: Path
    files: tuple[DataFile, ...]
    index: Index | None
    config: Config
    sidecars: tuple[Sidecar, ...]
    warnings: tuple[str, ...]
    own: OutputDocuments | None = None
    virtual: OutputDocuments | None = None

    @property
    def stored(self) -> dict[tuple[str, str], StoredTensor]:
        """All tensors by file and name: the files of several ranks have tensors of one name."""
        return {(f.name, t.name): t for f in self.files for t in f.header.tensors}

    @property
    def origin(self) -> OutputDocuments | None:
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
    """The local path of SRC; `hf://` addresses are fetched first. Raises SourceMissing."""
    text = str(src)
    path = hub.fetch(text) if text.startswith(hub.SCHEME) else Path(text)
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


def open_checkpoint(path: Path, *, exclude: tuple[str, ...] = ()) -> Checkpoint:
    """Read all headers, the index, config.json; list the sidecars. Opens no data.

    exclude: globs of sidecars to leave out. Raises the classes of `errors.files`.
    """
    if path.is_file():
        return _open_file(path)
    if (path / ROOT_NAME).exists():
        return _open_own(path, exclude)
    if _unfinished(path / PARTS_DIR):
        raise Unfinished(
            f"{quoted(path.name)} is an unfinished moeconv output",
            at=quoted(str(path)),
            cause=f"it has `{PARTS_DIR}/` but no `{ROOT_NAME}`, which is written last",
            fix="convert again with `--overwrite`",
        )
    return _open_directory(path, exclude)


def _unfinished(parts: Path) -> bool:
    """Whether a `moeconv/` is what a run of ours leaves, not just a folder of that name."""
    marks = ("journal", Path(ORIGIN_NAME).name)
    return any((parts / m).exists() for m in marks) or any(parts.glob(".*.partial"))


def _data_files(named: list[tuple[str, Path]]) -> tuple[DataFile, ...]:
    out = []
    for number, (name, path) in enumerate(sorted(named, key=lambda f: natural_key(f[0]))):
        header, stat = read_header(path, name=name, file=number)
        out.append(DataFile(name, path, stat.st_size, stat.st_mtime_ns, header))
    return tuple(out)


def _open_file(path: Path) -> Checkpoint:
    config = path.parent / CONFIG_NAME
    refuse_unsafe_name(path.name, path.parent)
    if path.suffix in _OTHERS:
        raise NoCheckpoint(
            f"{quoted(path.name)} is not a safetensors file",
            at=quoted(str(path)),
            cause=f"its name ends in {quoted(path.suffix)}",
            fix="pass the directory of the checkpoint, or one `.safetensors` file",
        )
    _refuse_fragment(path)
    files = _data_files([(path.name, path)])
    others: tuple[Sidecar, ...] = ()
    if config.exists():
        others = (sidecar(path.parent, CONFIG_NAME),)
        config = others[0].path
    warnings = tuple(missing_shards([path.name]))
    return Checkpoint(path.parent, files, None, read_config(config), others, warnings)


def _open_own(root: Path, exclude: tuple[str, ...]) -> Checkpoint:
    own = open_output(root)
    if own.manifest.root.source is not None:
        return _open_virtual(root, own, own.manifest.root.source, exclude)
    places = [(p.file, resolve_inside(root, p.file)) for p in own.manifest.parts]
    for name, path in places:
        if not path.exists():
            raise missing(name)
    files = _data_files(places)
    own.check_headers(tuple((f.name, f.size, f.header) for f in files))
    kept = tuple(s for s in own.sidecars if not matches(s.name, exclude))
    config = read_config(resolve_inside(root, CONFIG_NAME))
    return Checkpoint(root, files, None, config, kept, _foreign_warning(root, own), own)


def _open_virtual(
    root: Path, own: OutputDocuments, source: SourceEntry, exclude: tuple[str, ...]
) -> Checkpoint:
    """The source that a virtual output points into; only the recorded files of it matter.

    Raises SourceMissing, SourceChanged.
    """
    place = Path(source.directory)
    if not place.is_dir():
        raise SourceMissing(
            f"the source of the virtual output {quoted(str(root))} does not exist",
            at=quoted(source.directory),
            cause="there is no such directory",
            fix="restore it; a virtual output has no bytes of its own",
        )
    inner = None
    if (place / ROOT_NAME).exists():
        if read_root(place).source is not None:
            raise _changed(source, "it is itself a virtual output, without bytes of its own")
        found = open_checkpoint(place)
        inner, files = found.own, found.files
    else:
        files = _data_files([(f.name, _pinned(place, f.name, source)) for f in source.files])
    wanted = {(f.name, f.size, f.mtime_ns, f.header_digest) for f in source.files}
    there = {(f.name, f.size, f.mtime_ns, digest(f.header.raw)) for f in files}
    changed = sorted({name for name, *_ in wanted ^ there}, key=natural_key)
    if changed:
        raise _changed(source, f"{quoted_list(changed, most=1)}: written to, replaced or removed")
    kept = tuple(s for s in own.sidecars if not matches(s.name, exclude))
    config = read_config(resolve_inside(root, CONFIG_NAME))
    return Checkpoint(place, files, None, config, kept, (), inner, own)


def _pinned(place: Path, name: str, source: SourceEntry) -> Path:
    path = resolve_inside(place, name)
    if not path.is_file():
        raise _changed(source, f"{quoted(name)} is missing")
    return path


def _changed(source: SourceEntry, cause: str) -> SourceChanged:
    return SourceChanged(
        f"the source of the virtual output has changed: {cause.partition(':')[0]}",
        at=quoted(source.directory),
        cause=cause,
        fix="create the virtual output again",
    )


def _foreign_warning(root: Path, own: OutputDocuments) -> tuple[str, ...]:
    """Warn about files that were added to an output, since no command copies them."""
    found = foreign_files(root, own.manifest)
    if not found:
        return ()
    return (f"{quoted_list(found, most=1)} is not part of this output, and is not copied",)


def _refuse_fragment(path: Path) -> None:
    """Refuse one shard of several: converted alone it would look like a whole model."""
    index = _read_index(path.parent, sorted(os.listdir(path.parent)))  # noqa: PTH208
    if index is not None and path.name in index.files and len(index.files) > 1:
        raise NoCheckpoint(
            f"{quoted(path.name)} is one of {len(index.files)} shards",
            at=quoted(str(path)),
            cause=f"{quoted(index.name)} in the same directory names the others",
            fix=f"pass the directory: {quoted(str(path.parent))}",
        )


def _open_directory(root: Path, exclude: tuple[str, ...]) -> Checkpoint:
    try:
        names = sorted(os.listdir(root), key=natural_key)  # noqa: PTH208 - names, not paths
    except OSError as problem:
        raise SourceMissing(
            f"cannot list {quoted(str(root))}",
            cause=problem.strerror,
            fix="check that the directory is readable",
        ) from None
    shards = [n for n in names if n.endswith(SUFFIX)]
    index = _read_index(root, names)
    if index is not None:
        files = _data_files([(n, existing_file(root, n, named_by=index.name)) for n in index.files])
        _check_disjoint(files, fix="download the index and the shards again")
        _check_index(index, files)
    elif shards:
        wanted = [n for n in shards if not matches(n, exclude)]
        for name in wanted:
            refuse_unsafe_name(name, root)
        files = _data_files([(n, resolve_inside(root, n)) for n in wanted])
        _check_disjoint(files, fix="pass the index, or leave one of them out with `--exclude`")
    else:
        raise NoCheckpoint(
            f"{quoted(str(root))} holds no safetensors checkpoint",
            cause=_no_checkpoint_cause(names),
            fix="pass the directory that contains `model*.safetensors`",
        )
    skip = frozenset({f.name for f in files} | ({index.name} if index else set()))
    others = sidecars(root, skip=skip, exclude=exclude)
    config = read_config(resolve_inside(root, CONFIG_NAME))
    found = Checkpoint(root, files, index, config, others, ())
    warnings = source_warnings(
        index, tuple(f.name for f in files), found.tensor_bytes, others, has_config=config.present
    )
    return replace(found, warnings=tuple(warnings))


def _no_checkpoint_cause(names: list[str]) -> str:
    pickles = [n for n in names if n.endswith((".bin", ".pt", ".pth"))]
    if pickles:
        return f"it has {quoted(pickles[0])}: reading a pickle runs code, so moeconv reads none"
    return f"none of its {counted(len(names), 'entry', 'entries')} ends in `{SUFFIX}`"


def _read_index(root: Path, names: list[str]) -> Index | None:
    found = [n for n in names if n.endswith(_INDEX_SUFFIX)]
    name = INDEX_NAME if INDEX_NAME in found else next(iter(found), None)
    if name is None:
        return None
    if name != INDEX_NAME and len(found) > 1:
        raise BadIndex(
            f"{quoted(str(root))} has {len(found)} index files, none of them `{INDEX_NAME}`",
            cause=f"they are {', '.join(map(quoted, found))}",
            fix="keep only one of them in the directory",
        )
    refuse_unsafe_name(name, root)
    raw = read_document(resolve_inside(root, name), MAX_INDEX_BYTES, name=name)
    return parse_index(raw, name=name)


def _check_index(index: Index, files: tuple[DataFile, ...]) -> None:
    stored = {t.name: f.name for f in files for t in f.header.tensors}
    if stored == index.weight_map:
        return
    names = index.weight_map
    elsewhere = [t for t, file in names.items() if stored.get(t) != file]
    unnamed = [t for t in stored if t not in names]
    count = len(elsewhere) + len(unnamed)
    problems: list[MoeconvError] = [
        *(_not_in_file(index, t, names[t], stored.get(t)) for t in elsewhere[:_MAX_REPORTED]),
        *(_not_in_index(index, t, stored[t]) for t in unnamed[:_MAX_REPORTED]),
    ]
    if count > 1:
        problems[0].cause = f"{problems[0].cause}; {count:,} entries in total disagree"
    if problems:
        raise problems[0].with_also(tuple(problems[1:_MAX_REPORTED]))


def _not_in_file(index: Index, tensor: str, file: str, where: str | None) -> MoeconvError:
    return TensorNotInFile(
        f"{quoted(tensor)} is not in {quoted(file)}",
        at=f"{quoted(index.name)}, `weight_map`",
        cause=f"it is in {quoted(where)}" if where else "no file of the checkpoint holds it",
    )


def _not_in_index(index: Index, tensor: str, file: str) -> MoeconvError:
    return TensorNotInIndex(
        f"{quoted(tensor)} is not in the index",
        at=f"{quoted(file)}, tensor {quoted(tensor)}",
        cause=f"{quoted(index.name)} does not name it, so loaders would never read it",
    )


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
