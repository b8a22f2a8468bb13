"""`moeconv.json` and its parts: the values, their bytes, the strict reader (see FORMAT.md)."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import repeat
from typing import Final

from moeconv.digest import digest, fingerprint_line
from moeconv.jsonvalue import Json
from moeconv.strictjson import dumps

FORMAT: Final = "moeconv.manifest"
MAJOR: Final = 1
MINOR: Final = 0
ROOT_NAME: Final = "moeconv.json"
PARTS_DIR: Final = "moeconv"
ORIGIN_NAME: Final = "moeconv/origin"
MAX_ROOT_BYTES: Final = 64 * 1024 * 1024
MAX_RECIPE_TEXT: Final = 1024 * 1024
MAX_PART_BYTES: Final = 256 * 1024 * 1024
MAX_PAPER_BYTES: Final = 2 * 1024 * 1024 * 1024  # index and origin


@dataclass(frozen=True, slots=True)
class FileEntry:
    """A file of the set by relative path, size in bytes and digest of all its bytes."""

    name: str
    size: int
    digest: str


@dataclass(frozen=True, slots=True)
class StackEntry:
    """One expert stack: sizes E (experts), I (width), H (hidden), and where it came from."""

    name: str
    recipe: str
    layout: str
    origin_layout: str
    experts: int
    width: int
    hidden: int


@dataclass(frozen=True, slots=True)
class ExpertEntry:
    """What an expert tensor holds: `matrix` is the canonical shape of one logical matrix."""

    stack: int
    experts: tuple[int, int]  # first, one past the last
    projections: tuple[str, ...]
    component: str
    axes: str
    matrix: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class TensorEntry:
    """One stored tensor; `digests` run over experts, then projections (or are just one)."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    start: int
    stop: int
    digests: tuple[str, ...]
    expert: ExpertEntry | None = None


@dataclass(frozen=True, slots=True)
class Part:
    """One data file: its size, its header's size and digest, its tensors in file order."""

    file: str
    size: int
    header_size: int
    header_digest: str
    tensors: tuple[TensorEntry, ...]


@dataclass(frozen=True, slots=True)
class RecipeText:
    """A recipe as it was when the set was written, so that the way back never changes."""

    name: str
    toml: str


@dataclass(frozen=True, slots=True)
class Root:
    """The commit: everything else is named here by size and digest."""

    generator: str
    recipes: tuple[RecipeText, ...]
    stacks: tuple[StackEntry, ...]
    parts: tuple[FileEntry, ...]
    index: FileEntry
    origin: FileEntry
    sidecars: tuple[FileEntry, ...]
    tensor_count: int
    tensor_bytes: int
    fingerprint: str
    minor: int = MINOR


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

    def fingerprint_lines(self) -> Iterator[bytes]:
        """The lines of the fingerprint."""
        return (fingerprint_line(*matrix) for matrix in self.matrices())


def matrix_address(stack: str, expert: int, projection: str, component: str) -> str:
    """The address of a logical matrix, the same in every layout."""
    return f"{stack}.{expert}.{projection}.{component}"


def addresses(tensor: TensorEntry, stacks: tuple[StackEntry, ...]) -> Iterator[str]:
    """The addresses of what a tensor holds, in the order of its digests."""
    held = tensor.expert
    if held is None:
        yield tensor.name
        return
    stack = stacks[held.stack].name
    for expert in range(*held.experts):
        for projection in held.projections:
            yield matrix_address(stack, expert, projection, held.component)


def canonical_shape(tensor: TensorEntry) -> tuple[int, ...]:
    """The shape under which the digests of this tensor stand in the fingerprint."""
    return tensor.shape if tensor.expert is None else tensor.expert.matrix


# --- writing -----------------------------------------------------------------------------------
def part_name(file: str) -> str:
    """The part of a data file."""
    return f"{PARTS_DIR}/{file}.json"


def data_name(part: str) -> str:
    """The data file of a part."""
    return part.removeprefix(f"{PARTS_DIR}/").removesuffix(".json")


def _file_doc(entry: FileEntry) -> Json:
    return {"name": entry.name, "size": entry.size, "digest": entry.digest}


def root_bytes(root: Root) -> bytes:
    """Body, newline, digest of the body, newline."""
    body = dumps(
        {
            "format": FORMAT,
            "version": {"major": MAJOR, "minor": MINOR},
            "requires": [],
            "generator": root.generator,
            "recipes": [{"name": r.name, "toml": r.toml} for r in root.recipes],
            "stacks": [
                {
                    "name": s.name,
                    "recipe": s.recipe,
                    "layout": s.layout,
                    "origin_layout": s.origin_layout,
                    "experts": s.experts,
                    "width": s.width,
                    "hidden": s.hidden,
                }
                for s in root.stacks
            ],
            "parts": [_file_doc(p) for p in root.parts],
            "index": _file_doc(root.index),
            "origin": _file_doc(root.origin),
            "sidecars": [_file_doc(s) for s in root.sidecars],
            "totals": {"tensors": root.tensor_count, "bytes": root.tensor_bytes},
            "fingerprint": root.fingerprint,
        }
    )
    return body + b"\n" + digest(body).encode() + b"\n"


def part_bytes(part: Part) -> bytes:
    """One part as canonical JSON and a newline."""
    tensors: list[Json] = []
    for t in part.tensors:
        doc: dict[str, Json] = {
            "name": t.name,
            "dtype": t.dtype,
            "shape": list(t.shape),
            "start": t.start,
            "stop": t.stop,
            "digests": list(t.digests),
        }
        if t.expert is not None:
            doc["expert"] = {
                "stack": t.expert.stack,
                "experts": list(t.expert.experts),
                "projections": list(t.expert.projections),
                "component": t.expert.component,
                "axes": t.expert.axes,
                "matrix": list(t.expert.matrix),
            }
        tensors.append(doc)
    header: Json = {"size": part.header_size, "digest": part.header_digest}
    doc = {"file": part.file, "size": part.size, "header": header, "tensors": tensors}
    return dumps(doc) + b"\n"
