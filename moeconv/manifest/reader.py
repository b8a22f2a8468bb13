"""The strict reader of `moeconv.json`: all problems at once (see FORMAT.md)."""

from __future__ import annotations

from typing import Final

from moeconv.core.digest import DIGEST_HEX_DIGITS, digest
from moeconv.core.names import natural_key
from moeconv.core.schema import Problems, Table
from moeconv.core.strict_json import loads
from moeconv.core.text import counted
from moeconv.errors import BadManifest, Damaged, UnsupportedVersion, quoted
from moeconv.manifest.model import (
    DIGESTS_LATER,
    EXPERT_PARALLEL,
    FEATURES,
    FORMAT,
    MAJOR,
    MAX_EP_SIZE,
    MAX_PARTS,
    MAX_RECIPE_TEXT,
    MAX_RECIPES,
    MAX_STACKS,
    MINOR,
    ROOT_NAME,
    VIRTUAL,
    FileEntry,
    RecipeText,
    Root,
    SourceEntry,
    SourceFile,
    StackEntry,
)
from moeconv.manifest.rules import check_root

_FEW: Final = 64  # features that a message lists


def refuse(problems: Problems, where: str) -> None:
    """Raise BadManifest if there are problems."""
    if problems.count:
        raise BadManifest(
            f"{quoted(where)} violates the rules of its format in "
            f"{counted(problems.count, 'place')}",
            at=quoted(where),
            cause="; ".join(problems.shown()),
        )


def split_root(raw: bytes, *, where: str) -> bytes:
    """The body of a `moeconv.json`, after its own digest was checked. Raises Damaged."""
    body, mark = raw[: -DIGEST_HEX_DIGITS - 2], raw[-DIGEST_HEX_DIGITS - 2 :]
    if mark[:1] != b"\n" or mark[-1:] != b"\n" or mark[1:-1] != digest(body).encode():
        raise Damaged(
            f"{quoted(where)} is damaged: the digest in its last line is not that of its text",
            at=quoted(where),
            cause="a bit flipped, or the file was cut short or edited",
        )
    return body


def parse_root(raw: bytes, *, where: str = ROOT_NAME) -> Root:
    """Parse and check a root. Raises Damaged, BadManifest, UnsupportedVersion, BadJson."""
    doc = loads(split_root(raw, where=where), where=quoted(where), floats=False)
    problems = Problems()
    top = Table(doc, "", problems)
    minor, requires = _check_version(top, where)
    sharded, virtual = EXPERT_PARALLEL in requires, VIRTUAL in requires
    unread = DIGESTS_LATER in requires
    lacking = virtual or unread
    totals = top.table("totals")
    root = Root(
        generator=top.text("generator"),
        recipes=tuple(_recipe(t) for t in top.tables("recipes", MAX_RECIPES)),
        stacks=tuple(_stack(t, sharded=sharded) for t in top.tables("stacks", MAX_STACKS)),
        parts=tuple(_file(t) for t in top.tables("parts", MAX_PARTS)),
        index=None if sharded and top.null("index") else _file(top.table("index")),
        origin=_file(top.table("origin")),
        sidecars=tuple(_file(t) for t in top.tables("sidecars")),
        tensor_count=totals.integer("tensors"),
        tensor_bytes=totals.integer("bytes"),
        fingerprint=None if lacking and top.null("fingerprint") else top.digest("fingerprint"),
        ep_size=_ep_size(top.table("sharding")) if sharded else None,
        source=_source(top.table("source")) if virtual else None,
        unread=unread,
        minor=minor,
    )
    totals.finish()
    top.finish()
    if sharded and root.index is not None:
        top.problem(
            "index", "must be null: files of different ranks have tensors with the same name"
        )
    if not problems.skipped:
        check_root(root, problems)
    refuse(problems, where)
    return root


def _ep_size(t: Table) -> int:
    size = t.integer("ep_size", least=1)
    t.finish()
    if size > MAX_EP_SIZE:
        t.problem("ep_size", f"must be at most {MAX_EP_SIZE:,}")
        return 0
    return size


def _source(t: Table) -> SourceEntry:
    entry = SourceEntry(t.word("directory"), tuple(_source_file(f) for f in t.tables("files")))
    if not entry.directory.startswith("/"):
        t.problem("directory", "must be the absolute path of a directory")
    names = [f.name for f in entry.files]
    if names != sorted(set(names), key=natural_key):
        t.problem("files", "must be in natural order, each once: runs refer to them by number")
    t.finish()
    return entry


def _source_file(t: Table) -> SourceFile:
    header, mtime = t.table("header"), t.integers("mtime")
    if len(mtime) != 2 or mtime[1] >= 10**9:
        t.problem("mtime", "must be [seconds, nanoseconds]")
        mtime = (0, 0)
    entry = SourceFile(
        t.relative_path("name"),
        t.integer("size"),
        mtime[0] * 10**9 + mtime[1],
        header.integer("size"),
        header.digest("digest"),
    )
    header.finish()
    t.finish()
    return entry


def _check_version(top: Table, where: str) -> tuple[int, tuple[str, ...]]:
    if top.text("format") != FORMAT:
        top.problem("format", f"must be `{FORMAT}`")
    version = top.table("version")
    major, minor = version.integer("major"), version.integer("minor")
    requires = top.texts("requires")
    # a malformed version must not send anybody looking for a newer moeconv
    refuse(top.problems, where)
    unknown = [name for name in requires if name not in FEATURES]
    if major != MAJOR or unknown:
        raise UnsupportedVersion(
            f"{quoted(where)} is in a format that this moeconv cannot read",
            at=quoted(where),
            cause=f"it has format version {major}.{minor} and requires {list(requires[:_FEW])}; "
            f"this one reads {MAJOR}.x and knows {', '.join(f'`{name}`' for name in FEATURES)}",
            fix="install a newer moeconv" if major >= MAJOR else "convert the checkpoint again",
        )
    if len(set(requires)) != len(requires):
        top.problem("requires", "names a feature twice")
    if VIRTUAL in requires and EXPERT_PARALLEL not in requires:
        top.problem("requires", f"`{VIRTUAL}` requires `{EXPERT_PARALLEL}` too")
    top.problems.lenient = minor > MINOR
    version.finish()
    return minor, requires


def _file(t: Table) -> FileEntry:
    entry = FileEntry(t.relative_path("name"), t.integer("size"), t.digest("digest"))
    t.finish()
    return entry


def _recipe(t: Table) -> RecipeText:
    toml = t.raw("toml")
    if not isinstance(toml, str) or len(toml) > MAX_RECIPE_TEXT:
        t.problem("toml", f"must be a string of at most {MAX_RECIPE_TEXT:,} characters")
        toml = ""
    entry = RecipeText(t.text("name"), toml)
    t.finish()
    return entry


def _stack(t: Table, *, sharded: bool) -> StackEntry:
    has_row = sharded and t.given("physical_to_logical")
    entry = StackEntry(
        name=t.text("name"),
        recipe=t.text("recipe"),
        layout=t.text("layout"),
        origin_layout=t.text("origin_layout"),
        experts=t.integer("experts", least=1),
        width=t.integer("width"),
        hidden=t.integer("hidden"),
        physical_to_logical=t.integers("physical_to_logical") if has_row else None,
    )
    t.finish()
    return entry
