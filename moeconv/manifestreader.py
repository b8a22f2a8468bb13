"""The strict reader of `moeconv.json` and its parts: all problems at once (see FORMAT.md)."""

from __future__ import annotations

from collections import Counter

from moeconv.digest import DIGEST_HEX_DIGITS, digest
from moeconv.errors import BadManifest, Damaged, UnsupportedVersion, quoted
from moeconv.manifest import (
    FORMAT,
    MAJOR,
    MAX_RECIPE_TEXT,
    MINOR,
    ORIGIN_NAME,
    PARTS_DIR,
    ROOT_NAME,
    ExpertEntry,
    FileEntry,
    Part,
    RecipeText,
    Root,
    StackEntry,
    TensorEntry,
    data_name,
    part_name,
)
from moeconv.names import file_name_problem, relative_path_problem
from moeconv.schema import Problems, Table, is_digest
from moeconv.strictjson import loads


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
