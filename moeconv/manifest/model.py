"""`moeconv.json` and its parts as values (see FORMAT.md)."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import repeat
from typing import Final

from moeconv.core.digest import fingerprint_line

FORMAT: Final = "moeconv.manifest"
MAJOR: Final = 1
MINOR: Final = 1
ROOT_NAME: Final = "moeconv.json"
PARTS_DIR: Final = "moeconv"
ORIGIN_NAME: Final = "moeconv/origin"
COMMON: Final = "common"  # how the files for all ranks begin
COMMON_PART: Final = f"{PARTS_DIR}/{COMMON}.json"
EXPERT_PARALLEL: Final = "expert-parallel"  # features that a reader must know
VIRTUAL: Final = "virtual"
DIGESTS_LATER: Final = "digests-later"
FEATURES: Final = (EXPERT_PARALLEL, VIRTUAL, DIGESTS_LATER)
MAX_EP_SIZE: Final = 99_999
MAX_EXPERTS: Final = 1_048_576  # of a stack; its slots likewise
MAX_STACKS: Final = 100_000
MAX_PARTS: Final = 100_000  # one for each rank, and one for the common files
MAX_RECIPES: Final = 64
MAX_ROOT_BYTES: Final = 64 * 1024 * 1024
MAX_RECIPE_TEXT: Final = 128 * 1024
MAX_PART_BYTES: Final = 256 * 1024 * 1024
MAX_DOCUMENT_BYTES: Final = 2 * 1024 * 1024 * 1024  # index and origin


@dataclass(frozen=True, slots=True)
class FileEntry:
    """A file of an output: relative path, size in bytes, digest of all its bytes."""

    name: str
    size: int
    digest: str


@dataclass(frozen=True, slots=True)
class StackEntry:
    """One expert stack: sizes E (experts), I (width), H (hidden), and where it came from.

    physical_to_logical: [P], the expert in each slot, where ranks share the stack; slot p is on
    rank p // (P / ep_size).
    """

    name: str
    recipe: str
    layout: str
    origin_layout: str
    experts: int
    width: int
    hidden: int
    physical_to_logical: tuple[int, ...] | None = None

    @property
    def sizes(self) -> tuple[int, int, int]:
        """E, I, H."""
        return self.experts, self.width, self.hidden


@dataclass(frozen=True, slots=True)
class ExpertEntry:
    """What an expert tensor holds: `matrix` is the canonical shape of one logical matrix.

    experts: logical ids in the order in which they are stored. slots: the first physical slot and
    one past the last, in a rank's files. local: for a tensor of one expert that is kept for all
    ranks, the name it has on a rank, with `{slot}` for the slot within the rank.
    """

    stack: int
    experts: tuple[int, ...]
    projections: tuple[str, ...]
    component: str
    axes: str
    matrix: tuple[int, ...]
    slots: tuple[int, int] | None = None
    local: str | None = None

    @property
    def units(self) -> int:
        """How many logical matrices it holds."""
        return len(self.experts) * len(self.projections)


@dataclass(frozen=True, slots=True)
class Run:
    """Consecutive bytes of one of the source's files: its number, where they start, how many."""

    file: int
    offset: int
    nbytes: int


def append_run(runs: list[Run], run: Run) -> None:
    """Append a run, or extend the last one if it continues that."""
    last = runs[-1] if runs else None
    if last and (last.file, last.offset + last.nbytes) == (run.file, run.offset):
        runs[-1] = Run(last.file, last.offset, last.nbytes + run.nbytes)
    else:
        runs.append(run)


@dataclass(frozen=True, slots=True)
class TensorEntry:
    """One stored tensor; `digests` run over experts, then projections (or are just one).

    start, stop: bytes of its file; runs: in a virtual output, where its bytes are instead.
    digests: empty where the bytes have not been read yet.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    start: int
    stop: int
    digests: tuple[str, ...]
    expert: ExpertEntry | None = None
    runs: tuple[Run, ...] = ()


@dataclass(frozen=True, slots=True)
class Part:
    """One data file: its size, its header's size and digest, its tensors in file order.

    rank: whose file it is; None for common files and in whole outputs. A virtual output has no
    files of its own: `file` is empty, and the tensors are runs of the source.
    """

    file: str
    size: int
    header_size: int
    header_digest: str
    tensors: tuple[TensorEntry, ...]
    rank: int | None = None


@dataclass(frozen=True, slots=True)
class SourceFile:
    """A file that a virtual output points into, and what identifies it."""

    name: str
    size: int
    mtime_ns: int
    header_size: int
    header_digest: str


@dataclass(frozen=True, slots=True)
class SourceEntry:
    """Where the bytes of a virtual output are."""

    directory: str
    files: tuple[SourceFile, ...]


@dataclass(frozen=True, slots=True)
class RecipeText:
    """A recipe as it was when the output was written, so that the way back never changes."""

    name: str
    toml: str


@dataclass(frozen=True, slots=True)
class Root:
    """`moeconv.json`: names every other file with its size and digest; written last."""

    generator: str
    recipes: tuple[RecipeText, ...]
    stacks: tuple[StackEntry, ...]
    parts: tuple[FileEntry, ...]
    index: FileEntry | None
    origin: FileEntry
    sidecars: tuple[FileEntry, ...]
    tensor_count: int
    tensor_bytes: int
    fingerprint: str | None  # None where digests are missing
    ep_size: int | None = None  # None for a whole output
    source: SourceEntry | None = None  # of a virtual output
    unread: bool = False  # digests of data are to come later
    minor: int = MINOR

    @property
    def requires(self) -> tuple[str, ...]:
        """The features that a reader of this output must know."""
        has = (self.ep_size is not None, self.source is not None, self.unread)
        return tuple(name for name, wanted in zip(FEATURES, has, strict=True) if wanted)

    @property
    def may_lack_digests(self) -> bool:
        """Whether tensors may have none."""
        return self.unread or self.source is not None


@dataclass(frozen=True, slots=True)
class Manifest:
    """A root with all its parts."""

    root: Root
    parts: tuple[Part, ...]

    def matrices(self) -> Iterator[tuple[str, str, tuple[int, ...], str]]:
        """(address, dtype, canonical shape, digest) of every logical matrix and other tensor."""
        for part in self.parts:
            for tensor in part.tensors:
                yield from zip(
                    addresses(tensor, self.root.stacks),
                    repeat(tensor.dtype),
                    repeat(canonical_shape(tensor)),
                    tensor.digests,
                    strict=False,
                )

    @property
    def complete(self) -> bool:
        """Whether every digest is there."""
        return all(t.digests or not units_of(t) for p in self.parts for t in p.tensors)

    def fingerprint_lines(self) -> Iterator[bytes]:
        """The lines of the fingerprint, one for each matrix however many replicas it has."""
        return iter({fingerprint_line(*matrix) for matrix in self.matrices()})


def matrix_address(stack: str, expert: int, projection: str, component: str) -> str:
    """The address of a logical matrix, the same in every layout."""
    return f"{stack}.{expert}.{projection}.{component}"


def addresses(tensor: TensorEntry, stacks: tuple[StackEntry, ...]) -> Iterator[str]:
    """The addresses of what a tensor holds, in the order of its digests."""
    entry = tensor.expert
    if entry is None:
        yield tensor.name
        return
    stack = stacks[entry.stack].name
    for expert in entry.experts:
        for projection in entry.projections:
            yield matrix_address(stack, expert, projection, entry.component)


def units_of(tensor: TensorEntry) -> int:
    """How many digests a tensor has when all are there."""
    return 1 if tensor.expert is None else tensor.expert.units


def canonical_shape(tensor: TensorEntry) -> tuple[int, ...]:
    """The shape that the fingerprint has for the digests of this tensor."""
    return tensor.shape if tensor.expert is None else tensor.expert.matrix


# --- names of files --------------------------------------------------------------------------
def part_name(file: str) -> str:
    """The part of a data file."""
    return f"{PARTS_DIR}/{file}.json"


def data_name(part: str) -> str:
    """The data file of a part."""
    return part.removeprefix(f"{PARTS_DIR}/").removesuffix(".json")


def rank_name(rank: int, ep_size: int) -> str:
    """How the files of a rank begin; ranks count from 0."""
    return f"rank-{rank:05d}-of-{ep_size:05d}"


def files_name(rank: int | None, ep_size: int) -> str:
    """How the files of a rank (None: the common ones) begin; ranks count from 0."""
    return COMMON if rank is None else rank_name(rank, ep_size)


def numbered(prefix: str, count: int) -> list[str]:
    """The names of data files that begin alike; files count from 1."""
    return [f"{prefix}-{n:05d}-of-{count:05d}.safetensors" for n in range(1, count + 1)]


def rank_part(rank: int | None, ep_size: int) -> str:
    """The part of a rank (None: of the common files) of an expert-parallel output."""
    return f"{PARTS_DIR}/{files_name(rank, ep_size)}.json"


def part_names(ep_size: int) -> dict[str, int | None]:
    """The parts of an expert-parallel output, in order, and whose they are (None: common)."""
    return {rank_part(r, ep_size): r for r in (None, *range(ep_size))}
