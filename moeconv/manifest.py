"""`moeconv.json` and its parts: the values, their bytes, the strict reader (see FORMAT.md)."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import repeat
from typing import Final

from moeconv.digest import DIGEST_HEX_DIGITS, digest, fingerprint_line
from moeconv.errors import BadManifest, Damaged, UnsupportedVersion, quoted
from moeconv.names import file_name_problem, relative_path_problem
from moeconv.schema import Problems, Table, is_digest
from moeconv.strictjson import Json, dumps, loads

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


# --- reading -----------------------------------------------------------------------------------
def _refuse(problems: Problems, where: str) -> None:
    if problems.found:
        shown = problems.found[:20]
        more = len(problems.found) - len(shown)
        raise BadManifest(
            f"{quoted(where)} breaks the rules of its format in {len(problems.found)} place(s)",
            at=quoted(where),
            cause="; ".join(shown) + (f"; and {more} more" if more else ""),
            fix="convert the checkpoint again; a manifest is never edited by hand",
        )


def split_root(raw: bytes, *, where: str) -> bytes:
    """The body of a `moeconv.json`, after its own digest was checked. Raises Damaged."""
    body, mark = raw[: -DIGEST_HEX_DIGITS - 2], raw[-DIGEST_HEX_DIGITS - 2 :]
    if mark[:1] != b"\n" or mark[-1:] != b"\n" or mark[1:-1] != digest(body).encode():
        raise Damaged(
            f"{quoted(where)} is damaged: the digest in its last line is not that of its text",
            at=quoted(where),
            cause="a bit changed, the file is cut short, or somebody edited it",
            fix="fetch the set again, or convert again",
        )
    return body


def parse_root(raw: bytes, *, where: str = ROOT_NAME) -> Root:
    """Parse and check a root. Raises Damaged, BadManifest, UnsupportedVersion, BadJson."""
    doc = loads(split_root(raw, where=where), where=quoted(where), floats=False)
    problems = Problems()
    top = Table(doc, "", problems)
    minor = _check_version(top, where)
    totals = top.table("totals")
    root = Root(
        generator=top.text("generator"),
        recipes=tuple(_recipe(t) for t in top.tables("recipes")),
        stacks=tuple(_stack(t) for t in top.tables("stacks")),
        parts=tuple(_file(t) for t in top.tables("parts")),
        index=_file(top.table("index")),
        origin=_file(top.table("origin")),
        sidecars=tuple(_file(t) for t in top.tables("sidecars")),
        tensor_count=totals.integer("tensors"),
        tensor_bytes=totals.integer("bytes"),
        fingerprint=top.digest("fingerprint"),
        minor=minor,
    )
    totals.finish()
    top.finish()
    known = {r.name for r in root.recipes}
    problems.found += [
        f"stacks[{n}].recipe: {quoted(s.recipe)} is not among the recipes"
        for n, s in enumerate(root.stacks)
        if s.recipe not in known
    ]
    _check_names(root, problems)
    _refuse(problems, where)
    return root


def _check_names(root: Root, problems: Problems) -> None:
    """Each file once, and each where this format puts it."""
    for number, part in enumerate(root.parts):
        data = data_name(part.name)
        fits = part.name == part_name(data) and not file_name_problem(data)
        if not fits and not relative_path_problem(part.name):
            problems.add(f"parts[{number}].name", f"must be `{PARTS_DIR}/NAME.json`")
    if root.origin.name != ORIGIN_NAME:
        problems.add("origin.name", f"must be `{ORIGIN_NAME}`")
    if file_name_problem(root.index.name):
        problems.add("index.name", "must be a plain file name")
    files = [data_name(p.name) for p in root.parts]
    others = [root.index.name, *(s.name for s in root.sidecars)]
    reserved = [n for n in others if n.partition("/")[0] in (PARTS_DIR, ROOT_NAME)]
    twice = [name for name, count in Counter([*files, *others]).items() if count > 1]
    for name in dict.fromkeys([*twice, *reserved]):
        problems.add("", f"{quoted(name)} is named twice, or as two things")


def part_name(file: str) -> str:
    """The part of a data file."""
    return f"{PARTS_DIR}/{file}.json"


def data_name(part: str) -> str:
    """The data file of a part."""
    return part.removeprefix(f"{PARTS_DIR}/").removesuffix(".json")


def _check_version(top: Table, where: str) -> int:
    if top.text("format") != FORMAT:
        top.problem("format", f"must be `{FORMAT}`")
    version = top.table("version")
    major, minor = version.integer("major"), version.integer("minor")
    requires = top.texts("requires")
    # what is no version at all must not send anybody looking for a newer moeconv
    _refuse(top.problems, where)
    if major != MAJOR or requires:
        raise UnsupportedVersion(
            f"{quoted(where)} is of a kind this moeconv cannot read",
            at=quoted(where),
            cause=f"it has format version {major}.{minor} and requires {list(requires)}; "
            f"this one reads {MAJOR}.x and no required features",
            fix="install a newer moeconv" if major >= MAJOR else "convert the checkpoint again",
        )
    top.problems.lenient = minor > MINOR
    version.finish()
    return minor


def _file(t: Table) -> FileEntry:
    entry = FileEntry(t.relative_path("name"), t.integer("size"), t.digest("digest"))
    t.finish()
    return entry


def _recipe(t: Table) -> RecipeText:
    toml = t.raw("toml")
    if not isinstance(toml, str) or len(toml) > MAX_RECIPE_TEXT:
        t.problem("toml", f"must be a text of at most {MAX_RECIPE_TEXT:,} characters")
        toml = ""
    entry = RecipeText(t.text("name"), toml)
    t.finish()
    return entry


def _stack(t: Table) -> StackEntry:
    entry = StackEntry(
        name=t.text("name"),
        recipe=t.text("recipe"),
        layout=t.text("layout"),
        origin_layout=t.text("origin_layout"),
        experts=t.integer("experts", least=1),
        width=t.integer("width"),
        hidden=t.integer("hidden"),
    )
    t.finish()
    return entry


def parse_part(raw: bytes, root: Root, *, where: str) -> Part:
    """Parse and check one part against its root. Raises BadManifest, BadJson, DuplicateKey."""
    doc = loads(raw, where=quoted(where), floats=False)
    problems = Problems(lenient=root.minor > MINOR)
    top = Table(doc, "", problems)
    header = top.table("header")
    part = Part(
        file=top.file_name("file"),
        size=top.integer("size"),
        header_size=header.integer("size"),
        header_digest=header.digest("digest"),
        tensors=tuple(_tensor(t, root) for t in top.tables("tensors")),
    )
    top.finish()
    header.finish()
    _refuse(problems, where)
    return part


def _tensor(t: Table, root: Root) -> TensorEntry:
    expert = _expert(t.table("expert"), root) if t.has("expert") else None
    entry = TensorEntry(
        name=t.text("name"),
        dtype=t.text("dtype"),
        shape=t.integers("shape"),
        start=t.integer("start"),
        stop=t.integer("stop"),
        digests=t.texts("digests"),
        expert=expert,
    )
    t.finish()
    if not all(map(is_digest, entry.digests)):
        t.problem("digests", "must be digests of 32 lower-case hexadecimal digits")
    first, last = expert.experts if expert else (0, 1)
    expected = (last - first) * (len(expert.projections) if expert else 1)
    if len(entry.digests) != expected:
        t.problem("digests", f"must be {expected}, one for each logical matrix")
    if entry.stop < entry.start:
        t.problem("stop", "lies before `start`")
    return entry


def _expert(t: Table, root: Root) -> ExpertEntry:
    span = t.integers("experts")
    stack = t.integer("stack")
    entry = ExpertEntry(
        stack=stack,
        experts=(span[0], span[1]) if len(span) == 2 else (0, 0),
        projections=t.texts("projections"),
        component=t.text("component"),
        axes=t.text("axes"),
        matrix=t.integers("matrix"),
    )
    t.finish()
    if stack >= len(root.stacks):
        t.problem("stack", f"there are only {len(root.stacks)} stacks")
    elif len(span) != 2 or not 0 <= span[0] < span[1] <= root.stacks[stack].experts:
        t.problem("experts", "must be [first, one past the last] within the stack")
    if not entry.projections or len(set(entry.projections)) != len(entry.projections):
        t.problem("projections", "must be one or more different names")
    return entry
