"""A checkpoint as one frozen value: its files' headers, its index, its config, its sidecars."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from moeconv.checkpoint.config import Config
from moeconv.checkpoint.header import Header, StoredTensor
from moeconv.checkpoint.index import Index
from moeconv.checkpoint.origin import Origin, OriginFile, origin_of_taken
from moeconv.checkpoint.output import RecordedDocuments
from moeconv.core.names import natural_key
from moeconv.manifest.model import Manifest
from moeconv.store.base import File, Store


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

    @property
    def nbytes(self) -> int:
        """Bytes of its tensors."""
        return self.size - self.header.data_start if self.whole else self.header.nbytes

    @property
    def whole(self) -> bool:
        """Whether all tensors of the file are taken: `--only-index` may leave some out."""
        return self.header.whole


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

    def as_origin(self) -> Origin:
        """This foreign checkpoint as the origin of what is made from it."""
        as_stored = (OriginFile(f.name, f.size, f.header) for f in self.files)
        files = (f if f.header.whole else origin_of_taken(f) for f in as_stored)
        return Origin(tuple(sorted(files, key=lambda f: natural_key(f.name))), self.index)

    @property
    def manifest(self) -> Manifest | None:
        """The manifest of an output of moeconv."""
        return self.own.manifest if self.own else None

    @property
    def tensor_bytes(self) -> int:
        """Bytes of all tensors."""
        return sum(f.nbytes for f in self.files)
