"""The plan: output files, each a header and an exact cover of its data section by tiles.

All offsets and sizes are bytes. A *unit* is what one digest covers: a logical matrix, or a
whole tensor that belongs to no expert.
"""

from __future__ import annotations

from dataclasses import dataclass

from moeconv.manifest.model import ExpertEntry, RecipeText, StackEntry


@dataclass(frozen=True, slots=True)
class CopyTile:
    """One unit whose regions are contiguous: a run of the source and a run of the output."""

    start: int
    nbytes: int
    tensor: int  # index into OutputFile.tensors
    unit: int
    file: int  # source file
    offset: int  # in the source file


@dataclass(frozen=True, slots=True)
class Span:
    """One run of a source file that a permutation reads whole."""

    file: int
    offset: int
    nbytes: int


@dataclass(frozen=True, slots=True)
class Strided:
    """One matrix within a run of bytes: its first item, and the step along each of its axes.

    Both count items of the tile's `itemsize` bytes.
    """

    offset: int
    strides: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class StridedCopy:
    """One unit of a permutation: each element goes from its place in a span to one in the tile.

    span: index into the tile's spans. shape: canonical (O, K, packing). repeat: an earlier copy
    wrote to the same place, so the bytes must be equal to those.
    """

    unit: int
    span: int
    source: Strided
    target: Strided
    shape: tuple[int, ...]
    repeat: bool = False


@dataclass(frozen=True, slots=True)
class PermuteTile:
    """One run of the output whose units are transposed, interleaved or shared."""

    start: int
    nbytes: int
    tensor: int
    itemsize: int
    spans: tuple[Span, ...]
    pieces: tuple[StridedCopy, ...]

    @property
    def is_identity(self) -> bool:
        """Whether the bytes are copied unchanged and only the digests need the permutation."""
        return (
            len(self.spans) == 1
            and self.spans[0].nbytes == self.nbytes
            and all(p.source == p.target for p in self.pieces)
        )


Tile = CopyTile | PermuteTile


@dataclass(frozen=True, slots=True)
class OutputTensor:
    """One tensor of an output file at absolute `offset`; it holds `units` units."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    offset: int
    nbytes: int
    units: int
    expert: ExpertEntry | None


@dataclass(frozen=True, slots=True)
class OutputFile:
    """One output file: `header` is its first bytes, the tiles cover the rest exactly."""

    name: str
    header: bytes
    size: int
    tensors: tuple[OutputTensor, ...]
    tiles: tuple[Tile, ...]
    rank: int | None = None  # whose file it is, in an expert-parallel output


@dataclass(frozen=True, slots=True)
class LedgerEntry:
    """What becomes of one source tensor: `verb` is copied, renamed, fused, split, rearranged,
    sliced or merged (cut for ranks, or joined from them), shared (one value stored for several
    matrices, which must be equal), or replica (not read: another tensor holds the same experts).

    added: bytes that are written beyond its own, for redundant experts.
    """

    source: str
    verb: str
    into: tuple[str, ...]
    nbytes: int
    added: int = 0


@dataclass(frozen=True, slots=True)
class Rewrite:
    """A sidecar that the conversion changes; `before` are the bytes that the plan was made from."""

    name: str
    before: bytes
    after: bytes


@dataclass(frozen=True, slots=True)
class Plan:
    """A conversion, complete: the same for any number of workers.

    restores: the output is the origin itself, bit for bit, and gets no manifest.
    ep_size: of an expert-parallel output. virtual: no files are written; the bytes stay in the
    source.
    """

    files: tuple[OutputFile, ...]
    index_name: str | None
    index: bytes
    stacks: tuple[StackEntry, ...]
    recipes: tuple[RecipeText, ...]
    ledger: tuple[LedgerEntry, ...]
    notes: tuple[str, ...]
    restores: bool = False
    ep_size: int | None = None
    virtual: bool = False
    rewrites: tuple[Rewrite, ...] = ()

    @property
    def replica_bytes(self) -> int:
        """Bytes of redundant experts: what is written beyond the source."""
        return sum(entry.added for entry in self.ledger)

    @property
    def tensor_bytes(self) -> int:
        """Bytes of all data sections."""
        return sum(f.size - len(f.header) for f in self.files)

    @property
    def file_bytes(self) -> int:
        """Bytes of all data files, headers included."""
        return sum(f.size for f in self.files)

    @property
    def tensor_count(self) -> int:
        """Output tensors."""
        return sum(len(f.tensors) for f in self.files)
